// Package debian gets packages of any Debian release from the mirror that this machine's apt uses. It
// does not change the machine: each release has a private folder for apt's lists and downloads. It
// works as an ordinary user. apt checks downloads against Debian's signatures, as always.
package debian
