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
	registryRoom  = 1 << 16 // entries; memory is taken for those in use
)

// A Record is what the registry has of a member with a link of its own. What
// is attached, and where, is not in it: that the kernel tells.
type Record struct {
	Name, Owner string
	Priority    int
	// Attach is the attach type of the link, lest an id that is used again
	// gives a name to something else.
	Attach ebpf.AttachType
	// MovedTo is the link that has taken the place of this one, and MovedFrom the
	// one whose place this one has taken; 0 for none.
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

// MarshalBinary returns the record as it stands in the map.
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

// UnmarshalBinary reads a record; ErrNotOurs when it is none, ErrNotSupported
// when a later version wrote it.
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
		return fmt.Errorf("registry record with a name or priority that cannot be: %w", ErrNotOurs)
	}
	*r = Record{Name: name, Owner: owner, Priority: int(raw.Priority), Attach: ebpf.AttachType(raw.Attach), MovedTo: raw.MovedTo, MovedFrom: raw.MovedFrom}
	if raw.Target[targetSize-1] != 0 { // cut off: it could not be written back
		raw.Target = [targetSize]byte{}
	}
	r.LastSeen = LastSeen{Target: cString(raw.Target[:]), NetNS: hook.NetNS{Inode: raw.NetNSInode, Cookie: raw.NetNSCookie}}
	return nil
}

// A Registry has the names and priorities of members with links of their own,
// by link id. All methods of a nil Registry work, as if it were empty.
type Registry struct{ m *ebpf.Map }

// RegistryPath is where the registry is pinned.
func (p *Pins) RegistryPath() string { return p.Path(registryPin) }

// OpenRegistry opens the registry of the bpffs; fs.ErrNotExist when there is
// none, ErrNotSupported when what is there was read, and this version has no use
// for it. Any other error says nothing about the registry.
func (p *Pins) OpenRegistry() (*Registry, error) {
	path := p.RegistryPath()
	m, err := ebpf.LoadPinnedMap(path, nil)
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
	return &Registry{m}, nil
}

// isNoMap tells that something is at path that can be read and is not a map: a
// folder, or another object of BPF. The error of the kernel does not tell: for a
// folder it is EACCES (bpf_inode_type, kernel/bpf/inode.c), as for a refusal.
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

// Registry opens the registry, and makes it if there is none.
func (l *Locked) Registry() (*Registry, error) {
	r, err := l.OpenRegistry()
	if !errors.Is(err, fs.ErrNotExist) {
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
	_ = os.Remove(tmp) // of a process that had the same id
	defer os.Remove(tmp)
	err = pinClone(m, tmp)
	if err == nil {
		// Not over one that somebody made who did not wait for the lock.
		err = unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, l.Path(registryPin), unix.RENAME_NOREPLACE)
	}
	if err == nil {
		return &Registry{m}, nil
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

// Get returns the record of a link; nil when there is none, or one that is
// damaged or of a later version.
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
	return kernel.Errno("write to the registry", r.m.Put(link, b))
}

// Moved notes that a link, whose record is rec, has been moved to another one:
// there too for those that were moved to the first, which may be no more when
// somebody comes to ask for it.
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

// Delete removes the record of a link; none there is no error.
func (r *Registry) Delete(link uint32) error {
	if r == nil {
		return nil
	}
	if err := r.m.Delete(link); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return kernel.Errno("delete from the registry", err)
	}
	return nil
}

// Links returns the ids of all links that the registry has a record of.
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
