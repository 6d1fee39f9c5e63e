// Package features tries what this kernel and a device can do. What it attaches for
// that is in a network namespace of its own.
package features
