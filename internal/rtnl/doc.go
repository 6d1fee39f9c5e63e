// Package rtnl speaks rtnetlink: devices, and the XDP attribute through which
// programs are attached without a link.
package rtnl
