// Package rtnl speaks rtnetlink: devices, the XDP attribute by which programs
// are attached without a link, and filters of tc. By the netdev family it asks
// what a driver can do.
package rtnl
