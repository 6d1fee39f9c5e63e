// Package load gets the programs that shall be members: loaded ones by
// descriptor, id or pin, and from object files, loaded so that they fit the
// chain. It reads foreign bytes; what it cannot use it refuses with the reason.
package load
