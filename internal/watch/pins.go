package watch

import (
	"encoding/binary"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// A pinWatch watches the folders of pins. It holds no mount: the kernel removes the
// watches when the bpffs is unmounted.
type pinWatch struct {
	fd    int
	bpffs string
	buf   []byte

	mu      sync.Mutex
	watched map[int32]string
}

const pinChange = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_DELETE_SELF | unix.IN_ONLYDIR

func newPinWatch(bpffs string) (*pinWatch, error) {
	if err := isBPFFS(bpffs); err != nil {
		return nil, err
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify: %w", kernel.Explain(err))
	}
	p := &pinWatch{fd: fd, bpffs: bpffs, buf: make([]byte, 1<<14), watched: map[int32]string{}}
	p.follow()
	return p, nil
}

func isBPFFS(path string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return fmt.Errorf("bpffs %s: %w", path, kernel.Explain(err))
	}
	if st.Type != unix.BPF_FS_MAGIC {
		return fmt.Errorf("%s is not a bpffs", path)
	}
	return nil
}

// follow watches the folders that exist. Folders that are already watched stay watched.
func (p *pinWatch) follow() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if isBPFFS(p.bpffs) != nil {
		return
	}
	p.add(p.bpffs)
	_ = filepath.WalkDir(filepath.Join(p.bpffs, "libdispatcher"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			p.add(path)
		}
		return nil
	})
}

func (p *pinWatch) add(path string) {
	if wd, err := unix.InotifyAddWatch(p.fd, path, pinChange); err == nil {
		p.watched[int32(wd)] = path
	}
}

// read tells whether something of ours changed. A new folder is watched from the next
// look on, and that look is soon.
func (p *pinWatch) read() (sign bool, lost string) {
	for {
		n, err := unix.Read(p.fd, p.buf)
		if err != nil || n <= 0 {
			return sign, lost
		}
		for b := p.buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			wd, mask := int32(binary.NativeEndian.Uint32(b)), binary.NativeEndian.Uint32(b[4:])
			size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[12:]))
			if mask&unix.IN_Q_OVERFLOW != 0 {
				lost = "inotify said more than could be read"
			}
			name := unix.ByteSliceToString(b[unix.SizeofInotifyEvent:size])
			p.mu.Lock()
			if p.watched[wd] != p.bpffs || name == "libdispatcher" || mask&unix.IN_UNMOUNT != 0 {
				sign = true
			}
			if mask&unix.IN_IGNORED != 0 {
				delete(p.watched, wd)
			}
			p.mu.Unlock()
			b = b[size:]
		}
	}
}

func (p *pinWatch) close() { unix.Close(p.fd) }
