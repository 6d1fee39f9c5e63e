package state

import (
	"encoding/hex"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// ChainFolder names the folder of a chain. It is named after the chain's root link, if
// there is one: that id stays when the device is renamed or moved.
func ChainFolder(linkID uint32, chainID uint64) string {
	if linkID != 0 {
		return fmt.Sprintf("xdp_%d", linkID)
	}
	return fmt.Sprintf("xdp_chain_%016x", chainID)
}

// ParseChainFolder returns the ids of a name that ChainFolder made; zeros for other
// names.
func ParseChainFolder(folder string) (linkID uint32, chainID uint64) {
	if digits, ok := strings.CutPrefix(folder, "xdp_chain_"); ok {
		chainID, _ = strconv.ParseUint(digits, 16, 64)
		return 0, chainID
	}
	id, _ := strconv.ParseUint(strings.TrimPrefix(folder, "xdp_"), 10, 32)
	return uint32(id), 0
}

// LinkFolder names the folder of a member with a link of its own after the hook's
// family and the link.
func LinkFolder(h hook.Hook, linkID uint32) string { return fmt.Sprintf("%s_%d", h.Family(), linkID) }

// ParseLinkFolder returns the link of a name that LinkFolder made; 0 for other names.
func ParseLinkFolder(folder string) uint32 {
	for _, family := range linkFamilies {
		if digits, ok := strings.CutPrefix(folder, family+"_"); ok {
			id, _ := strconv.ParseUint(digits, 10, 32)
			return uint32(id)
		}
	}
	return 0
}

var linkFamilies = []string{hook.TCXIngress.Family(), hook.CgroupConnect4.Family()}

// heldName is the file in a member's folder that keeps the member attached.
func heldName(folder string) string {
	if ParseLinkFolder(folder) != 0 {
		return linkName
	}
	return slotName
}

// escape turns the name of a member or a map into a file name. A bpffs accepts no dots
// (bpf_lookup, kernel/bpf/inode.c), and no file name has a slash. All bytes but
// letters, digits, dash and underscore become %XX.
func escape(s string) string {
	var b strings.Builder
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_':
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

func unescape(s string) (string, error) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '%' {
			b.WriteByte(s[i])
			continue
		}
		if i+3 > len(s) {
			return "", fmt.Errorf("%q ends within an escape", s)
		}
		c, err := hex.DecodeString(s[i+1 : i+3])
		if err != nil {
			return "", fmt.Errorf("%q: %w", s, err)
		}
		b.WriteByte(c[0])
		i += 2
	}
	return b.String(), nil
}

// ParseHeldPath returns the parts of a path that HeldPath made. The path may also be
// the member's folder. Other paths are errors.
func ParseHeldPath(path string) (pins *Pins, folder, member string, err error) {
	path, err = filepath.Abs(path)
	if err != nil {
		return nil, "", "", err
	}
	path = strings.TrimSuffix(strings.TrimSuffix(path, "/"+slotName), "/"+linkName)
	dir, name := filepath.Split(path)
	dir, folder = filepath.Split(filepath.Clean(dir))
	encoded, ok := strings.CutPrefix(name, memberPrefix)
	if ok && filepath.Base(dir) == folderName {
		if member, err = unescape(encoded); err == nil {
			return &Pins{filepath.Clean(dir)}, folder, member, nil
		}
	}
	return nil, "", "", fmt.Errorf("%s is not a member's pin; such a path looks like %s/%s/xdp_12/%sNAME/%s or .../tcx_13/%sNAME/%s",
		path, kernel.DefaultBPFFS, folderName, memberPrefix, slotName, memberPrefix, linkName)
}
