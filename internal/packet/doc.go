// Package packet builds packets, describes them in one line, and reads them from
// capture files. It is pure: bytes in, bytes out.
package packet
