// Package libxdp speaks the protocol of libxdp (xdp-tools): it reads, joins and
// changes the chains of its dispatcher.
package libxdp
