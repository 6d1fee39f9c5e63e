package state

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

const (
	// RegistryName is the name of the registry in the kernel.
	RegistryName = "ld_registry"
	registryPin  = "registry"

	recordMagic   = 0x6c647231 // "ldr1"
	recordVersion = 1
	recordSize    = 40 + 2*nameSize + targetSize
	targetSize    = 256
	registryRoom  = 1 << 16 // entries; only those in use take memory
)

// A Record is the registry's entry of a member with a link of its own. What is
// attached, and where, the kernel tells.
type Record struct {
	Name, Owner string
	Priority    int
	// Attach is the attach type of the link. If the id is used again, the new link
	// does not get the name.
	Attach ebpf.AttachType
	// MovedTo is the link that replaced this one, and MovedFrom the link that this one
	// replaced; 0 for none.
	MovedTo, MovedFrom uint32
	// LastSeen is where the member was attached; a path that is too long is left out.
	LastSeen LastSeen
}

type rawRecord struct {
	Magic     uint32
	Version   uint32
	Priority  uint32
	Attach    uint32
	MovedTo   uint32
	MovedFrom uint32
	Name      [nameSize]byte
	Owner     [nameSize]byte

	NetNSInode  uint64
	NetNSCookie uint64
	Target      [targetSize]byte
}

// MarshalBinary returns the record as the map has it.
func (r *Record) MarshalBinary() ([]byte, error) {
	raw := rawRecord{
		Magic: recordMagic, Version: recordVersion,
		Priority: uint32(r.Priority), Attach: uint32(r.Attach), MovedTo: r.MovedTo, MovedFrom: r.MovedFrom,
	}
	copy(raw.Name[:nameSize-1], r.Name)
	copy(raw.Owner[:nameSize-1], r.Owner)
	raw.NetNSInode, raw.NetNSCookie = r.LastSeen.NetNS.Inode, r.LastSeen.NetNS.Cookie
	if len(r.LastSeen.Target) < targetSize {
		copy(raw.Target[:], r.LastSeen.Target)
	}
	return binary.Append(nil, binary.NativeEndian, raw)
}

// UnmarshalBinary reads a record. The error is ErrNotOurs if b is no record, and
// ErrNotSupported if a later version wrote it.
func (r *Record) UnmarshalBinary(b []byte) error {
	var raw rawRecord
	if _, err := binary.Decode(b, binary.NativeEndian, &raw); err != nil || raw.Magic != recordMagic {
		return ErrNotOurs
	}
	if raw.Version > recordVersion {
		return fmt.Errorf("registry record of version %d, this program knows up to %d: %w", raw.Version, recordVersion, ebpf.ErrNotSupported)
	}
	name, owner := unix.ByteSliceToString(raw.Name[:]), unix.ByteSliceToString(raw.Owner[:])
	if hook.CheckName(name) != nil || owner != "" && hook.CheckName(owner) != nil ||
		raw.Priority < hook.MinPriority || raw.Priority > hook.MaxPriority {
		return fmt.Errorf("registry record with an impossible name or priority: %w", ErrNotOurs)
	}
	*r = Record{Name: name, Owner: owner, Priority: int(raw.Priority), Attach: ebpf.AttachType(raw.Attach), MovedTo: raw.MovedTo, MovedFrom: raw.MovedFrom}
	if raw.Target[targetSize-1] != 0 { // the path was cut off
		raw.Target = [targetSize]byte{}
	}
	r.LastSeen = LastSeen{Target: unix.ByteSliceToString(raw.Target[:]), NetNS: hook.NetNS{Inode: raw.NetNSInode, Cookie: raw.NetNSCookie}}
	return nil
}

// A Registry has the names and priorities of members with links of their own, by link
// id. The methods of a nil Registry work as for an empty one.
type Registry struct {
	m        *ebpf.Map
	readOnly bool // as its bpffs is: nothing can be written
}

// RegistryPath is the path of the registry's pin.
func (p *Pins) RegistryPath() string { return p.Path(registryPin) }

// OpenRegistry opens the registry of the bpffs. The error is fs.ErrNotExist if there
// is none, and ErrNotSupported if this version cannot use what it read there. Any
// other error says nothing about the registry.
func (p *Pins) OpenRegistry() (*Registry, error) {
	path := p.RegistryPath()
	m, err := ebpf.LoadPinnedMap(path, nil)
	readOnly := errors.Is(err, unix.EROFS)
	if readOnly {
		m, err = ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, hook.Because(fs.ErrNotExist, "there is no registry at %s", path)
	case err != nil && isNoMap(path):
		return nil, hook.Because(ebpf.ErrNotSupported, "registry at %s: it is not a map", path)
	case err != nil:
		return nil, kernel.Errno("registry at "+path, err)
	}
	if m.Type() != ebpf.Hash || m.KeySize() != 4 || m.ValueSize() != recordSize {
		m.Close()
		return nil, hook.Because(ebpf.ErrNotSupported, "registry at %s: of another version", path)
	}
	return &Registry{m, readOnly}, nil
}

// isNoMap tells whether path leads to something that can be read and is no map: a
// folder, or another BPF object. The kernel's error does not tell: for a folder it is
// EACCES (bpf_inode_type, kernel/bpf/inode.c), as for a lack of privileges.
func isNoMap(path string) bool {
	if st, err := os.Stat(path); err == nil && st.IsDir() {
		return true
	}
	if prog, err := ebpf.LoadPinnedProgram(path, nil); err == nil {
		prog.Close()
		return true
	}
	l, err := link.LoadPinnedLink(path, nil)
	if err == nil {
		l.Close()
	}
	return err == nil
}

// Registry opens the registry, and makes it if there is none. It returns nil, as if
// the registry were empty, for one of another version.
func (l *Locked) Registry() (*Registry, error) {
	r, err := l.OpenRegistry()
	switch {
	case errors.Is(err, ebpf.ErrNotSupported):
		return nil, nil
	case !errors.Is(err, fs.ErrNotExist):
		return r, err
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: RegistryName, Type: ebpf.Hash, KeySize: 4, ValueSize: recordSize, MaxEntries: registryRoom,
		Flags: unix.BPF_F_NO_PREALLOC, Key: u32, Value: recordType,
	})
	if err != nil {
		return nil, kernel.Errno("make the registry", err)
	}
	tmp := filepath.Join(l.dir, fmt.Sprintf("%sregistry_%d_%d", tmpPrefix, os.Getpid(), m.FD()))
	_ = os.Remove(tmp) // a process with the same id may have left one
	defer os.Remove(tmp)
	err = pinClone(m, tmp)
	if err == nil {
		// A process that did not get the lock in time may have made one meanwhile.
		err = unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, l.Path(registryPin), unix.RENAME_NOREPLACE)
	}
	if err == nil {
		return &Registry{m: m}, nil
	}
	m.Close()
	if errors.Is(err, fs.ErrExist) {
		return l.OpenRegistry()
	}
	return nil, kernel.Errno("pin the registry", err)
}

var recordType = structType("ld_record",
	field{"magic", u32}, field{"version", u32}, field{"priority", u32}, field{"attach_type", u32},
	field{"moved_to", u32}, field{"moved_from", u32}, field{"name", string64}, field{"owner", string64},
	field{"netns_inode", u64}, field{"netns_cookie", u64},
	field{"target", &btf.Array{Index: u32, Type: char, Nelems: targetSize}})

// Close releases the registry.
func (r *Registry) Close() {
	if r != nil {
		r.m.Close()
	}
}

// Get returns the record of a link; nil if there is none, or if it is damaged or of a
// later version.
func (r *Registry) Get(link uint32) (*Record, error) {
	if r == nil {
		return nil, nil
	}
	b, err := r.m.LookupBytes(link)
	if err != nil || b == nil {
		return nil, kernel.Errno("read the registry", err)
	}
	rec := new(Record)
	if rec.UnmarshalBinary(b) != nil {
		return nil, nil
	}
	return rec, nil
}

// Put writes the record of a link.
func (r *Registry) Put(link uint32, rec *Record) error {
	if r == nil {
		return nil
	}
	b, err := rec.MarshalBinary()
	if err != nil {
		return err
	}
	return r.writable(kernel.Errno("write to the registry", r.m.Put(link, b)))
}

// writable returns the error of a write. A descriptor that only reads gets EPERM, of which
// the read-only bpffs is the cause.
func (r *Registry) writable(err error) error {
	if r.readOnly && errors.Is(err, unix.EPERM) {
		return kernel.Errno("write to the registry", unix.EROFS)
	}
	return err
}

// Moved records that a link, which has the record rec, was replaced by another link.
// It also updates the records of links that were replaced by the first link: when one
// of them is looked up, the record of the first link may be gone.
func (r *Registry) Moved(old, to uint32, rec *Record) error {
	links, err := r.Links()
	if err != nil {
		return err
	}
	for _, id := range links {
		before, err := r.Get(id)
		if err != nil {
			return err
		}
		if before != nil && before.MovedTo == old {
			before.MovedTo = to
			if err := r.Put(id, before); err != nil {
				return err
			}
		}
	}
	rec.MovedTo = to
	return r.Put(old, rec)
}

// Delete removes the record of a link. It is no error if there is none.
func (r *Registry) Delete(link uint32) error {
	if r == nil {
		return nil
	}
	if err := r.m.Delete(link); !errors.Is(err, ebpf.ErrKeyNotExist) {
		return r.writable(kernel.Errno("delete from the registry", err))
	}
	return nil
}

// Links returns the ids of all links with a record.
func (r *Registry) Links() ([]uint32, error) {
	if r == nil {
		return nil, nil
	}
	var links []uint32
	var key uint32
	var value []byte
	it := r.m.Iterate()
	for it.Next(&key, &value) {
		links = append(links, key)
	}
	return links, kernel.Errno("read the registry", it.Err())
}
