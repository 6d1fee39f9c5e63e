package load

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// lastWords returns the verifier's sentences at the end of a log: what comes
// after the last instruction or state, and before the statistics.
func lastWords(log []string) string {
	var words []string
	for _, line := range slices.Backward(log) {
		line = strings.TrimSpace(line)
		switch first, _, _ := strings.Cut(line, " "); {
		case line == "", first == "processed", first == "verification", first == "stack", strings.HasPrefix(line, "mark_precise"):
		case strings.HasSuffix(first, ":"), strings.HasPrefix(line, ";"), len(words) == 2:
			return strings.Join(words, ": ")
		default:
			words = slices.Insert(words, 0, line)
		}
	}
	return strings.Join(words, ": ")
}

// Refused returns the error for a program that the kernel refused to load, with the
// cause in one line: a hook.VerifierRefusal if the verifier refused it. missing are types
// and fields that the program relocates to and that this kernel does not have.
func Refused(name string, err error, missing ...string) error {
	var ve *ebpf.VerifierError
	if errors.As(err, &ve) && len(ve.Log) > 0 {
		why := ve.Cause.Error()
		if words := lastWords(ve.Log); words != "" {
			why = fmt.Sprintf("%s (%s)", words, why)
		}
		switch {
		// cilium/ebpf puts an invalid instruction in the place of what it cannot relocate.
		case strings.Contains(ve.Error(), "bad CO-RE relocation") && len(missing) > 0:
			why = fmt.Sprintf("it needs what the types of this kernel do not have: %s (CO-RE)", list(missing))
		// bpf_dev_bound_kfunc_check, kernel/bpf/offload.c.
		case strings.Contains(why, "device-bound program"):
			why += "; a member of a chain cannot be bound to a device, so it cannot read the device's metadata of packets (XDP hints)"
		}
		refused := &hook.VerifierRefusal{Program: name, Why: why, Log: ve.Log, Err: ve}
		if err := kernel.Uncompiled(refused); err != nil {
			return err
		}
		return refused
	}
	switch {
	case errors.Is(err, ebpf.ErrMapIncompatible):
		return hook.Because(hook.ErrIncompatible, "program %q: a shared map differs from the file's: %w", name, err)
	case errors.Is(err, unix.EPERM):
		return kernel.Errno("load program "+name, err)
	}
	return kernel.Errno(fmt.Sprintf("load program %q", name), err)
}

// relocated is what [btf.CORERelocation] prints of itself: the kind of type, its name, and
// the way to the field in indices, of which the first is for an array of the type.
var relocated = regexp.MustCompile(`, (\w+):"([^"]+)"\[([0-9:]+)\]`)

// missingTypes returns the types and fields that a program relocates to and that this
// kernel does not have, such as "sk_buff.tstamp_type".
func missingTypes(spec *ebpf.CollectionSpec, name string) []string {
	here, err := btf.LoadKernelSpec()
	if err != nil || spec.Types == nil {
		return nil
	}
	var missing []string
	for i := range spec.Programs[name].Instructions {
		relo := btf.CORERelocationMetadata(&spec.Programs[name].Instructions[i])
		if relo == nil {
			continue
		}
		fixed, err := btf.CORERelocate([]*btf.CORERelocation{relo}, []*btf.Spec{here}, kernel.ByteOrder, spec.Types.TypeID)
		m := relocated.FindStringSubmatch(relo.String())
		if err != nil || m == nil || !strings.HasSuffix(fixed[0].String(), "=poison") {
			continue
		}
		if field := fieldAt(spec.Types, m[2], strings.Split(m[3], ":")[1:]); !slices.Contains(missing, field) {
			missing = append(missing, field)
		}
	}
	return missing
}

// fieldAt names a field of a type of the file by the way to it.
func fieldAt(types *btf.Spec, name string, way []string) string {
	text, _, _ := strings.Cut(name, "___") // what follows tells versions of a type apart
	found, err := types.AnyTypesByName(name)
	if err != nil {
		return text
	}
	t := btf.UnderlyingType(found[0])
	for _, step := range way {
		i, _ := strconv.Atoi(step)
		var members []btf.Member
		switch at := t.(type) {
		case *btf.Struct:
			members = at.Members
		case *btf.Union:
			members = at.Members
		case *btf.Array:
			t = btf.UnderlyingType(at.Type)
			text += "[" + step + "]"
			continue
		}
		if i >= len(members) {
			break
		}
		if members[i].Name != "" { // not of an anonymous struct or union
			text += "." + members[i].Name
		}
		t = btf.UnderlyingType(members[i].Type)
	}
	return text
}
