package state

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
)

const (
	// MapName is the name of every description's map.
	MapName = "ld_chain"

	magic = 0x6c646331 // "ldc1"
	// Version is the latest version of the description. Readers refuse a later one.
	Version = sealedVersion
	// plainVersion is used for a chain without linked members, so that programs that
	// know no other version can read it.
	plainVersion  = 1
	sealedVersion = 2

	headerSize   = 32
	memberSize   = 16 + 2*nameSize
	nameSize     = hook.MaxName + 1
	valueSize    = headerSize + hook.MaxMembers*memberSize
	lastSeenSize = 40                         // after that; early programs left it out
	sealedSize   = hook.MaxMembers * sealSize // after that, in sealedVersion
	sealSize     = 8 + sha256.Size

	flagFrags  = 1 << 0
	flagClosed = 1 << 1

	memberPersistent = 1 << 0
)

// ErrNotOurs: the program is not a dispatcher of libdispatcher.
var ErrNotOurs = errors.New("not a dispatcher of libdispatcher")

// A Chain is the description of a chain.
type Chain struct {
	// ID is random. It is chosen when the chain is made and never changes.
	ID uint64
	// RootLink is the id of the link that carries the dispatcher. It is 0 for the first
	// dispatcher, which is made before its link, and for a chain that is attached by
	// netlink.
	RootLink uint32
	// Closed means that the chain has no members and never gets any: it is about to be
	// detached.
	Closed bool
	// LastSeen is where the chain was when a member last joined it.
	LastSeen LastSeen
	// Watch is the map id of the prog array that the dispatcher tries before it runs
	// the chain itself, see [Watch]; 0 if it does not.
	Watch uint32
	dispatch.Plan
}

// LastSeen is where a chain or a member was last seen. It serves to find the target
// again when the device is gone and a device of the same name has come. The chain or
// member may have moved meanwhile.
type LastSeen struct {
	Target string     // name of the device, or path of the cgroup
	NetNS  hook.NetNS // of the device
	Mode   hook.Mode  // of XDP
}

// String returns it in words; empty if nothing is known.
func (s LastSeen) String() string {
	if s.Target == "" {
		return ""
	}
	return "was on " + s.Target
}

type rawLastSeen struct {
	NetNSInode  uint64
	NetNSCookie uint64
	Mode        uint32
	Watch       uint32
	Device      [unix.IFNAMSIZ]byte
}

// rawHeader is the beginning of the layout. All numbers are in native byte order, and
// there is no padding but the named fields.
type rawHeader struct {
	Magic      uint32
	Version    uint32
	ChainID    uint64
	RootLink   uint32
	AttachType uint32
	Flags      uint32
	Members    uint32
}

type rawMember struct {
	Slot       uint32
	Priority   uint32
	ContinueOn uint32
	OnMissing  uint8
	Flags      uint8
	_          uint16
	Name       [nameSize]byte
	Owner      [nameSize]byte
}

type rawSeal struct {
	Program uint32
	Frame   uint32
	Code    dispatch.CodeHash
}

// Sealed tells whether members are linked into the dispatcher.
func (c *Chain) Sealed() bool {
	return slices.ContainsFunc(c.Slots, func(s dispatch.Slot) bool { return s.Sealed.Program != 0 })
}

// Marshal returns the description as the map has it.
func (c *Chain) Marshal() ([]byte, error) {
	if len(c.Slots) > hook.MaxMembers {
		return nil, hook.Because(hook.ErrChainFull, "%d members, at most %d fit", len(c.Slots), hook.MaxMembers)
	}
	h := rawHeader{
		Magic: magic, Version: plainVersion, ChainID: c.ID, RootLink: c.RootLink,
		AttachType: uint32(c.Shape.AttachType), Members: uint32(len(c.Slots)),
	}
	if c.Shape.Frags {
		h.Flags |= flagFrags
	}
	if c.Closed {
		h.Flags |= flagClosed
	}
	if c.Sealed() {
		h.Version = sealedVersion
	}
	b := make([]byte, 0, valueSize+lastSeenSize+sealedSize)
	b, err := binary.Append(b, binary.NativeEndian, h)
	if err != nil {
		return nil, err
	}
	for _, s := range c.Slots {
		m := rawMember{
			Slot: s.MapID, Priority: uint32(s.Priority),
			ContinueOn: uint32(s.ContinueOn), OnMissing: uint8(s.OnMissing),
		}
		if s.Persistent {
			m.Flags |= memberPersistent
		}
		copy(m.Name[:nameSize-1], s.Name)
		copy(m.Owner[:nameSize-1], s.Owner)
		if b, err = binary.Append(b, binary.NativeEndian, m); err != nil {
			return nil, err
		}
	}
	b = append(b, make([]byte, valueSize-len(b))...)
	seen := rawLastSeen{NetNSInode: c.LastSeen.NetNS.Inode, NetNSCookie: c.LastSeen.NetNS.Cookie, Mode: uint32(c.LastSeen.Mode), Watch: c.Watch}
	copy(seen.Device[:unix.IFNAMSIZ-1], c.LastSeen.Target)
	b, err = binary.Append(b, binary.NativeEndian, seen)
	if err != nil || h.Version == plainVersion {
		return b, err
	}
	seals := make([]rawSeal, hook.MaxMembers)
	for i, s := range c.Slots {
		seals[i] = rawSeal(s.Sealed)
	}
	return binary.Append(b, binary.NativeEndian, seals)
}

// Unmarshal reads a description. The error is ErrNotOurs if b is no description, and
// ErrNotSupported if a later version wrote it.
func Unmarshal(b []byte) (*Chain, error) {
	var h rawHeader
	if _, err := binary.Decode(b, binary.NativeEndian, &h); err != nil || h.Magic != magic {
		return nil, ErrNotOurs
	}
	if h.Version > Version {
		return nil, fmt.Errorf("chain description of version %d, this program knows up to %d: %w", h.Version, Version, ebpf.ErrNotSupported)
	}
	if h.Version == 0 || len(b) < valueSize || h.Members > hook.MaxMembers || h.Flags&^(flagFrags|flagClosed) != 0 {
		return nil, fmt.Errorf("damaged chain description: version %d, %d bytes, %d members, flags %#x", h.Version, len(b), h.Members, h.Flags)
	}
	c := &Chain{
		ID: h.ChainID, RootLink: h.RootLink, Closed: h.Flags&flagClosed != 0,
		Plan: dispatch.Plan{Shape: dispatch.Shape{
			AttachType: ebpf.AttachType(h.AttachType), Frags: h.Flags&flagFrags != 0,
		}},
	}
	for i := range int(h.Members) {
		s, err := unmarshalMember(b[headerSize+i*memberSize:])
		if err == nil && (c.Index(s.MapID) >= 0 || c.Named(s.Name) >= 0) {
			err = errors.New("its name or slot occurs twice")
		}
		if err != nil {
			return nil, fmt.Errorf("damaged chain description: member %d: %w", i, err)
		}
		c.Slots = append(c.Slots, s)
	}
	var seen rawLastSeen
	if _, err := binary.Decode(b[valueSize:], binary.NativeEndian, &seen); err == nil {
		c.Watch = seen.Watch
		c.LastSeen = LastSeen{
			Target: unix.ByteSliceToString(seen.Device[:unix.IFNAMSIZ-1]), Mode: hook.Mode(seen.Mode),
			NetNS: hook.NetNS{Inode: seen.NetNSInode, Cookie: seen.NetNSCookie},
		}
	}
	if h.Version < sealedVersion {
		return c, nil
	}
	var seals [hook.MaxMembers]rawSeal
	if _, err := binary.Decode(b[min(len(b), valueSize+lastSeenSize):], binary.NativeEndian, &seals); err != nil {
		return nil, fmt.Errorf("damaged chain description: version %d, %d bytes", h.Version, len(b))
	}
	for i, seal := range seals {
		if seal != (rawSeal{}) && (i >= len(c.Slots) || seal.Program == 0) {
			return nil, fmt.Errorf("damaged chain description: member %d: linked code without a program", i)
		}
		if i < len(c.Slots) {
			c.Slots[i].Sealed = dispatch.Sealed(seal)
		}
	}
	return c, nil
}

func unmarshalMember(b []byte) (dispatch.Slot, error) {
	var m rawMember
	if _, err := binary.Decode(b, binary.NativeEndian, &m); err != nil {
		return dispatch.Slot{}, err
	}
	s := dispatch.Slot{
		MapID: m.Slot,
		Name:  unix.ByteSliceToString(m.Name[:]), Owner: unix.ByteSliceToString(m.Owner[:]),
		Settings: hook.Settings{
			Priority: int(m.Priority), ContinueOn: hook.VerdictSet(m.ContinueOn), OnMissing: hook.OnMissing(m.OnMissing),
		},
		Persistent: m.Flags&memberPersistent != 0,
	}
	if s.MapID == 0 {
		return s, errors.New("no slot")
	}
	if err := hook.CheckName(s.Name); err != nil {
		return s, err
	}
	if s.Owner != "" {
		if err := hook.CheckName(s.Owner); err != nil {
			return s, fmt.Errorf("owner: %w", err)
		}
	}
	if err := s.Settings.Check(); err != nil {
		return s, err
	}
	if s.Settings != s.Settings.WithDefaults() {
		return s, errors.New("a setting is missing")
	}
	return s, nil
}

// mapSpec is the map that holds a description. It has a type, so that "bpftool map
// dump" shows the fields.
func mapSpec(value []byte) *ebpf.MapSpec {
	typ := descriptionType
	if len(value) > valueSize+lastSeenSize {
		typ = sealedDescriptionType
	}
	return &ebpf.MapSpec{
		Name: MapName, Type: ebpf.Array, KeySize: 4, ValueSize: uint32(len(value)), MaxEntries: 1,
		Flags:    readOnlyProg,
		Key:      u32,
		Value:    typ,
		Contents: []ebpf.MapKV{{Key: uint32(0), Value: value}},
	}
}

var (
	u8       = &btf.Int{Name: "unsigned char", Size: 1}
	u16      = &btf.Int{Name: "unsigned short", Size: 2}
	u32      = &btf.Int{Name: "unsigned int", Size: 4}
	u64      = &btf.Int{Name: "unsigned long long", Size: 8}
	char     = &btf.Int{Name: "char", Size: 1, Encoding: btf.Char}
	string64 = &btf.Array{Index: u32, Type: char, Nelems: nameSize}

	memberType = structType("ld_member",
		field{"slot", u32}, field{"priority", u32}, field{"continue_on", u32},
		field{"on_missing", u8}, field{"flags", u8}, field{"reserved", u16},
		field{"name", string64}, field{"owner", string64})
	descriptionType = structType(MapName, descriptionFields...)
	sealType        = structType("ld_seal", field{"program", u32}, field{"frame", u32},
		field{"code", &btf.Array{Index: u32, Type: u8, Nelems: sha256.Size}})
	sealedDescriptionType = structType(MapName, append(descriptionFields[:len(descriptionFields):len(descriptionFields)],
		field{"sealed", &btf.Array{Index: u32, Type: sealType, Nelems: hook.MaxMembers}})...)

	descriptionFields = []field{
		{"magic", u32}, {"version", u32}, {"chain_id", u64}, {"root_link", u32},
		{"attach_type", u32}, {"flags", u32}, {"members", u32},
		{"member", &btf.Array{Index: u32, Type: memberType, Nelems: hook.MaxMembers}},
		{"netns_inode", u64}, {"netns_cookie", u64}, {"mode", u32}, {"watch", u32},
		{"device", &btf.Array{Index: u32, Type: char, Nelems: unix.IFNAMSIZ}},
	}
)

type field struct {
	name string
	typ  btf.Type
}

// structType puts the fields one after the other. Their order is such that they need
// no padding.
func structType(name string, fields ...field) *btf.Struct {
	s := &btf.Struct{Name: name}
	for _, f := range fields {
		size, err := btf.Sizeof(f.typ)
		if err != nil {
			panic(err)
		}
		s.Members = append(s.Members, btf.Member{Name: f.name, Type: f.typ, Offset: btf.Bits(s.Size * 8)})
		s.Size += uint32(size)
	}
	return s
}
