// Package xdploader is a drop-in replacement for xdp-loader, the tool of libxdp
// (xdp-tools). It has the commands, options, messages and exit codes of version
// 1.6.3, for scripts that call it. It works on libxdp's own chains, and does
// not change chains of libdispatcher. docs/xdp-loader.md lists the differences.
package xdploader
