// Package load gets the programs that become members. It finds loaded programs by
// descriptor, id or pin, and loads programs from object files such that they fit the
// chain. It does not trust the files: it refuses what it cannot use, with the reason.
package load
