// Package packet makes packets, says in a line what they are, and reads them from
// capture files. It is pure: bytes in, bytes out.
package packet
