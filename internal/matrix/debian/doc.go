// Package debian gets packages of any Debian release from the mirror that this machine's apt uses,
// without a change to the machine: each release has a private folder of apt's lists and downloads. It
// works as an ordinary user. What is downloaded is checked against Debian's signatures as ever.
package debian
