package holders_test

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// pin pins the object of fd.
func pin(fd int, path string) error {
	name, err := unix.BytePtrFromString(path)
	if err != nil {
		return err
	}
	attr := struct {
		path      uint64
		fd, flags uint32
	}{uint64(uintptr(unsafe.Pointer(name))), uint32(fd), 0}
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_OBJ_PIN, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return errno
	}
	return nil
}

// register makes an io_uring, registers fd with it and closes fd.
func register(fd int) error {
	var params [120]byte // struct io_uring_params
	ring, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		return errno
	}
	const registerFiles = 2
	fds := int32(fd)
	_, _, errno = unix.Syscall6(unix.SYS_IO_URING_REGISTER, ring, registerFiles, uintptr(unsafe.Pointer(&fds)), 1, 0, 0)
	if errno != 0 {
		return errno
	}
	return unix.Close(fd)
}

// inode returns the inode of a file.
func inode(path string) (uint64, error) {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	return st.Ino, err
}
