// Package features tries what this kernel and a device can do. It attaches programs
// only in a network namespace of its own.
package features
