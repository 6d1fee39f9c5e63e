// Package declare is the document that says what shall be attached on a host: what
// "dispatcher apply" reads from files. It is plain data, so that other sources (an agent, an object
// of a cluster) can carry the same type. docs/operations.md shows it at work.
//
// A key that is left out has its default, whatever the program's file asks for: so
// what is declared is all in the document.
package declare
