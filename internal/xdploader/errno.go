package xdploader

import (
	"errors"
	"io/fs"
	"syscall"

	"golang.org/x/sys/unix"
)

// A failure is an error of an xdp-loader command: a number, which may be one of
// libbpf's. The command has already printed its messages.
type failure struct {
	code int // positive
	err  error
}

func (f *failure) Error() string { return message(f.code) }
func (f *failure) Unwrap() error { return f.err }

// failed returns a failure with that number; err may be nil.
func failed(code syscall.Errno, err error) *failure { return &failure{int(code), err} }

// errFailed is a failure without a number: the command exits with 1.
var errFailed = errors.New("failed")

// exitCode returns the exit code of a command that returned err.
func exitCode(err error) int {
	if err == nil {
		return exitOK
	}
	if errors.Is(err, errFailed) {
		return exitFailure
	}
	if code := -number(err) & 0xff; code != 0 {
		return code
	}
	return exitFailure
}

// number returns the error number inside an error, or EINVAL if there is none.
func number(err error) int {
	var f *failure
	var errno syscall.Errno
	switch {
	case errors.As(err, &f):
		return f.code
	case errors.As(err, &errno) && errno != 0:
		return int(errno)
	case errors.Is(err, fs.ErrNotExist):
		return int(unix.ENOENT)
	case errors.Is(err, fs.ErrExist):
		return int(unix.EEXIST)
	case errors.Is(err, fs.ErrPermission):
		return int(unix.EPERM)
	case errors.Is(err, errors.ErrUnsupported):
		return int(unix.EOPNOTSUPP)
	}
	return int(unix.EINVAL)
}

// words returns C's text for the error.
func words(err error) string { return message(number(err)) }

// Errors of libbpf (enum libbpf_errno, bpf/libbpf_legacy.h).
const (
	errLibelf = 4000
	errFormat = 4001
	errEndian = 4003
)

var libbpfMessages = map[int]string{
	errLibelf: "Something wrong in libelf",
	errFormat: "BPF object format invalid",
	errEndian: "Endian mismatch",
}

func message(code int) string {
	if s := libbpfMessages[code]; s != "" {
		return s
	}
	// Go has the texts of the C library, but begins them with a small letter
	// unless the second letter is a capital.
	s := syscall.Errno(code).Error()
	if len(s) > 1 && isLower(s[0]) && isLower(s[1]) {
		s = string(s[0]-'a'+'A') + s[1:]
	}
	return s
}

func isLower(c byte) bool { return 'a' <= c && c <= 'z' }
