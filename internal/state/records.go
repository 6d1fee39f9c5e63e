package state

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

const (
	// RecordsName is the name in the kernel of a map with records.
	RecordsName = "ld_records"

	recordMagic   = 0x6c647231 // "ldr1"
	recordVersion = 1
	recordSize    = 48 + 2*nameSize + targetSize
	targetSize    = 256
	recordsRoom   = 1 << 16 // entries; only those in use take memory
)

// A Record is what the kernel does not tell of a member with a link of its own.
type Record struct {
	Name, Owner string
	Priority    int
	// Attach is the attach type of the link. If the id is used again, the new link
	// does not get the name.
	Attach ebpf.AttachType
	// Member is a number that stays the member's when another link takes the place of
	// this one. 0 is no number.
	Member uint64
	// MovedFrom is the link that this one replaces; 0 for none.
	MovedFrom uint32
	// LastSeen is where the member was attached; a path that is too long is left out.
	LastSeen LastSeen
}

type rawRecord struct {
	Magic     uint32
	Version   uint32
	Priority  uint32
	Attach    uint32
	Member    uint64
	MovedFrom uint32
	_         uint32
	Name      [nameSize]byte
	Owner     [nameSize]byte

	NetNSInode  uint64
	NetNSCookie uint64
	Target      [targetSize]byte
}

// MarshalBinary returns the record as a map has it.
func (r *Record) MarshalBinary() ([]byte, error) {
	raw := rawRecord{
		Magic: recordMagic, Version: recordVersion,
		Priority: uint32(r.Priority), Attach: uint32(r.Attach), Member: r.Member, MovedFrom: r.MovedFrom,
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
		return fmt.Errorf("record of version %d, this program knows up to %d: %w", raw.Version, recordVersion, ebpf.ErrNotSupported)
	}
	name, owner := unix.ByteSliceToString(raw.Name[:]), unix.ByteSliceToString(raw.Owner[:])
	if hook.CheckName(name) != nil || owner != "" && hook.CheckName(owner) != nil ||
		raw.Priority < hook.MinPriority || raw.Priority > hook.MaxPriority {
		return fmt.Errorf("record with an impossible name or priority: %w", ErrNotOurs)
	}
	*r = Record{Name: name, Owner: owner, Priority: int(raw.Priority), Attach: ebpf.AttachType(raw.Attach), Member: raw.Member, MovedFrom: raw.MovedFrom}
	if raw.Target[targetSize-1] != 0 { // the path was cut off
		raw.Target = [targetSize]byte{}
	}
	r.LastSeen = LastSeen{Target: unix.ByteSliceToString(raw.Target[:]), NetNS: hook.NetNS{Inode: raw.NetNSInode, Cookie: raw.NetNSCookie}}
	return nil
}

var recordType = structType("ld_record",
	field{"magic", u32}, field{"version", u32}, field{"priority", u32}, field{"attach_type", u32},
	field{"member", u64}, field{"moved_from", u32}, field{"unused", u32}, field{"name", string64}, field{"owner", string64},
	field{"netns_inode", u64}, field{"netns_cookie", u64},
	field{"target", &btf.Array{Index: u32, Type: char, Nelems: targetSize}})

// recordKey is the key of a record. The map is a trie because a trie takes memory only for
// its entries; a hash takes it for max_entries (htab_map_alloc, kernel/bpf/hashtab.c).
type recordKey struct{ Prefix, Link uint32 }

var keyType = structType("ld_record_key", field{"prefixlen", u32}, field{"link", u32})

func keyOf(link uint32) recordKey { return recordKey{32, link} }

// Records has the records of a program's members by their links. The map is bound to the
// program: it is found from any link that runs the program, without a bpffs, and goes with
// the program. There are several only when processes that did not wait for each other
// made them.
type Records []*ebpf.Map

// RecordsOf opens the records of a program; there are none if it never was a member's. The
// caller closes them.
func RecordsOf(prog *ebpf.Program) (Records, error) {
	ids, err := kernel.ProgramMaps(prog)
	if err != nil {
		return nil, err
	}
	var records Records
	// A map that is bound to a program stands behind all that it had
	// (bpf_prog_bind_map, kernel/bpf/syscall.c). No other map of the program is opened
	// but the one before: that might be a prog array, see Slots.
	for _, id := range slices.Backward(ids) {
		m, err := openRecords(id)
		if errors.Is(err, ErrNotOurs) {
			break
		}
		if err != nil {
			records.Close()
			return nil, err
		}
		records = append(records, m)
	}
	return records, nil
}

// mapInfo is the beginning of struct bpf_map_info (linux/bpf.h).
type mapInfo struct {
	kind, _, keySize, valueSize uint32
	_, _                        uint32
	name                        [unix.BPF_OBJ_NAME_LEN]byte
}

// openRecords opens a map of records. The error is ErrNotOurs for another map.
func openRecords(id ebpf.MapID) (*ebpf.Map, error) {
	fd, err := kernel.OpenMap(id, 0)
	if err != nil {
		return nil, kernel.Errno("read the names of members", err)
	}
	var info mapInfo
	err = kernel.ObjectInfo(fd, &info)
	if err == nil && (unix.ByteSliceToString(info.name[:]) != RecordsName || ebpf.MapType(info.kind) != ebpf.LPMTrie ||
		info.keySize != 8 || info.valueSize != recordSize) {
		err = ErrNotOurs
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	m, err := ebpf.NewMapFromFD(fd)
	return m, kernel.Errno("read the names of members", err)
}

// KeepRecords opens the records of a program, and makes them if there are none. The caller
// closes them.
func KeepRecords(prog *ebpf.Program) (Records, error) {
	records, err := RecordsOf(prog)
	// A process that may not open maps by their ids makes new ones.
	if len(records) > 0 || err != nil && !errors.Is(err, fs.ErrPermission) {
		return records, err
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: RecordsName, Type: ebpf.LPMTrie, KeySize: 8, ValueSize: recordSize, MaxEntries: recordsRoom,
		Flags: unix.BPF_F_NO_PREALLOC, Key: keyType, Value: recordType,
	})
	if err != nil {
		return nil, kernel.Errno("make the names of members", err)
	}
	records = Records{m}
	if err := records.Bind(prog); err != nil {
		records.Close()
		return nil, err
	}
	return records, nil
}

// Bind binds the records to another program too.
func (r Records) Bind(prog *ebpf.Program) error {
	for _, m := range r {
		if err := prog.BindMap(m); err != nil {
			return kernel.Errno("bind the names of members", err)
		}
	}
	return nil
}

// Records opens the records that are pinned with a member; none if none are. To read only,
// only Get can be used. The caller closes them.
func (p *Pins) Records(folder, member string, readOnly bool) (Records, error) {
	path := p.Path(folder, memberPrefix+escape(member), mapPrefix+escape(RecordsName))
	m, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: readOnly})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, kernel.PathErrno("open the pin", path, err)
	}
	if m.Type() != ebpf.LPMTrie || m.KeySize() != 8 || m.ValueSize() != recordSize {
		m.Close()
		return nil, nil
	}
	return Records{m}, nil
}

// Clone opens the same records again.
func (r Records) Clone() (Records, error) {
	var twins Records
	for _, m := range r {
		twin, err := m.Clone()
		if err != nil {
			twins.Close()
			return nil, kernel.Errno("the names of members", err)
		}
		twins = append(twins, twin)
	}
	return twins, nil
}

// Close releases the records.
func (r Records) Close() {
	for _, m := range r {
		m.Close()
	}
}

// Get returns the record of a link; nil if there is none, or if it is damaged or of a
// later version.
func (r Records) Get(link uint32) (*Record, error) {
	for _, m := range r {
		b, err := m.LookupBytes(keyOf(link))
		if err != nil {
			return nil, kernel.Errno("read the names of members", err)
		}
		rec := new(Record)
		if b != nil && rec.UnmarshalBinary(b) == nil {
			return rec, nil
		}
	}
	return nil, nil
}

// Put writes the record of a link, and removes those of links that do not exist any more.
func (r Records) Put(link uint32, rec *Record) error {
	b, err := rec.MarshalBinary()
	if err != nil {
		return err
	}
	to := r[0]
	for _, m := range r {
		links, err := linksIn(m)
		if err != nil {
			return err
		}
		for _, id := range links {
			switch {
			case id == link:
				to = m
			case !kernel.LinkMayExist(id):
				_ = m.Delete(keyOf(id)) // another process may have deleted it
			}
		}
	}
	return kernel.Errno("write the name of the member", to.Put(keyOf(link), b))
}

// Delete removes the record of a link. It is no error if there is none.
func (r Records) Delete(link uint32) error {
	for _, m := range r {
		if err := m.Delete(keyOf(link)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return kernel.Errno("delete the name of the member", err)
		}
	}
	return nil
}

// Links returns the ids of all links with a record.
func (r Records) Links() ([]uint32, error) {
	var links []uint32
	for _, m := range r {
		of, err := linksIn(m)
		if err != nil {
			return nil, err
		}
		links = append(links, of...)
	}
	return links, nil
}

func linksIn(m *ebpf.Map) ([]uint32, error) {
	var links []uint32
	var key recordKey
	var value []byte
	it := m.Iterate()
	for it.Next(&key, &value) {
		links = append(links, key.Link)
	}
	return links, kernel.Errno("read the names of members", it.Err())
}
