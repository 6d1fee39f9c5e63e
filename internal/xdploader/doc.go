// Package xdploader is a drop-in replacement of xdp-loader, the tool of libxdp
// (xdp-tools): the same commands, options, words and exit codes as those of
// version 1.6.3, for scripts that call it. It works on libxdp's own chains, and
// leaves those of libdispatcher alone. docs/xdp-loader.md says what differs.
package xdploader
