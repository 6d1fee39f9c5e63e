// Package plan compares what is declared with what is attached, and says what is to be done. It is
// pure: package apply reads, and does what the plan says.
package plan
