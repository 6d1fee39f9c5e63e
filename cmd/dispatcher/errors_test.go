package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unicode"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// at is an error of the library.
func at(err error) error { return hook.Wrap("attach", hook.XDP, "eth0", err) }

func TestExitStatus(t *testing.T) {
	for _, test := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{usage("", "bad"), 1},
		{fmt.Errorf("--map: %w", usage("", "bad")), 1},
		{at(dispatcher.ErrUsage), 1},
		{at(hook.Because(dispatcher.ErrUsage, "damaged: %w", fs.ErrNotExist)), 1},
		{errors.New("other"), 2},
		{at(dispatcher.ErrPermission), 2},
		{at(syscall.EINVAL), 2},
		{context.Canceled, 2},
		{at(dispatcher.ErrBusy), 3},
		{at(dispatcher.ErrChanged), 3},
		{at(dispatcher.ErrChainFull), 3},
		{at(fs.ErrExist), 3},
		{at(fs.ErrNotExist), 4},
		{&os.PathError{Op: "open", Path: "x.o", Err: syscall.ENOENT}, 4},
		{at(dispatcher.ErrDefunct), 4},
		{at(dispatcher.ErrIncompatible), 5},
		{at(ebpf.ErrNotSupported), 5},
	} {
		qt.Check(t, qt.Equals(exitStatus(test.err), test.want), qt.Commentf("%v", test.err))
	}
}

func TestFail(t *testing.T) {
	occupied := &dispatcher.Error{
		Op: "attach", Hook: hook.XDP, Target: "eth0", Err: dispatcher.ErrBusy, Hint: "see \"dispatcher list\"",
		Occupant: &hook.Occupant{Kind: hook.KindForeign, LinkID: 12, Mode: hook.ModeNative, Program: hook.Program{ID: 41, Name: "cil_xdp_entry", Tag: "2cdaa4a309ea9ba2"}},
	}
	refused := &dispatcher.Error{
		Op: "attach", Hook: hook.XDP, Target: "eth0",
		Err: load.Refused("filter", &ebpf.VerifierError{
			Cause: syscall.EACCES, Log: []string{"0: R1=ctx()", "R1 offset is outside of the packet", "processed 3 insns"},
		}),
	}
	for _, test := range []struct {
		name string
		app
		err        error
		wantStatus int
		want       string
	}{
		{
			"text", app{}, occupied, 3,
			"dispatcher: attach xdp eth0: held by link 12 (program cil_xdp_entry, id 41, tag 2cdaa4a309ea9ba2, native mode); see \"dispatcher list\"\n",
		},
		{
			"json", app{format: formatJSON}, occupied, 3,
			`{"version":1,"error":{"op":"attach","hook":"xdp","target":"eth0","cause":"hook is busy","hint":"see \"dispatcher list\"",` +
				`"occupant":{"kind":"foreign","program":{"id":41,"name":"cil_xdp_entry","tag":"2cdaa4a309ea9ba2","loaded_by_uid":0},"link_id":12,"mode":"native"},"exit":3}}` + "\n",
		},
		{
			"several lines", app{}, errors.New("one\ntwo\n"), 2, "dispatcher: one two\n",
		},
		{
			"several", app{}, join(nil, join(at(fs.ErrNotExist), errDrift), dispatcher.ErrUsage), 4,
			"dispatcher: attach xdp eth0: file does not exist\ndispatcher: there is something to mend\ndispatcher: invalid request\n",
		},
		{
			"several, json", app{format: formatJSON}, join(at(fs.ErrNotExist), errDrift), 4,
			`{"version":1,"error":{"op":"attach","hook":"xdp","target":"eth0","cause":"file does not exist","exit":4}}` + "\n" +
				`{"version":1,"error":{"cause":"there is something to mend","exit":4}}` + "\n",
		},
		{
			"colour", app{color: "always"}, errors.New("no"), 2, "\x1b[31mdispatcher:\x1b[0m no\n",
		},
		{
			"usage, json", app{format: formatJSON}, usage("see <there>", "bad %d", 7), 1,
			`{"version":1,"error":{"cause":"bad 7","hint":"see <there>","exit":1}}` + "\n",
		},
		{
			"wrapped usage, json", app{format: formatJSON}, fmt.Errorf("--map m=id:x: %w", usage("as in id:41", "not an id")), 1,
			`{"version":1,"error":{"cause":"--map m=id:x: not an id","hint":"as in id:41","exit":1}}` + "\n",
		},
		{
			"verifier", app{}, refused, 2,
			"dispatcher: attach xdp eth0: the verifier refused program \"filter\": R1 offset is outside of the packet (permission denied)\n" +
				"dispatcher: note: -v prints the verifier's whole log\n",
		},
		{
			"verifier, json", app{format: formatJSON, verbose: true}, refused, 2,
			`{"version":1,"error":{"op":"attach","hook":"xdp","target":"eth0","cause":"the verifier refused program \"filter\": R1 offset is outside of the packet (permission denied)",` +
				`"verifier":["0: R1=ctx()","R1 offset is outside of the packet","processed 3 insns"],"exit":2}}` + "\n",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			var errs bytes.Buffer
			a := test.app
			a.stderr = &errs
			qt.Check(t, qt.Equals(a.fail(test.err), test.wantStatus))
			qt.Check(t, qt.Equals(errs.String(), test.want))
		})
	}

	var errs bytes.Buffer
	a := app{stderr: &errs, verbose: true}
	a.fail(refused)
	qt.Check(t, qt.StringContains(errs.String(), "0: R1=ctx()"))
}

func TestDidYouMean(t *testing.T) {
	verbs := []string{"attach", "detach", "list", "ls"}
	for wrong, want := range map[string]string{
		"atach":  `did you mean "attach"?`,
		"det":    `did you mean "detach"?`,
		"lsit":   `did you mean "list"?`,
		"x":      "see",
		"remove": "see",
		"":       "see",
	} {
		qt.Check(t, qt.Equals(didYouMean(wrong, verbs, "", "see"), want), qt.Commentf("%s", wrong))
	}
}

// strictMain is main, which ends with exit status 99 when the library returns an error that is
// not as it must be, or that is not the same as text and as JSON.
func strictMain() {
	kernel.OnError = func(err error) {
		wrong := testenv.CheckError(err)
		if j := describeError(shown(err)); wrong == nil && textOf(j) != err.Error() {
			wrong = fmt.Errorf("the error %q is as JSON %q", err, textOf(j))
		}
		if wrong != nil {
			fmt.Fprintln(os.Stderr, wrong)
			os.Exit(99)
		}
	}
	main()
}

// textOf is the text of an error as its JSON has it.
func textOf(j jsonError) string {
	at := []string{j.Op, string(j.Hook), j.Target}
	if strings.ContainsFunc(j.Target, func(r rune) bool { return !unicode.IsPrint(r) }) || len(j.Target) > 200 {
		at[2] = fmt.Sprintf("%.200q", j.Target)
	}
	at = slices.DeleteFunc(at, func(word string) bool { return word == "" })
	text := strings.Join(at, " ")
	if o := j.Occupant; o != nil {
		shown := *o.Occupant
		shown.Mode, _ = hook.ParseMode(o.Mode) // of none: auto
		text += fmt.Sprintf(": held by %v", &shown)
	}
	if j.Occupant == nil || j.Cause != hook.ErrBusy.Error() {
		text = strings.TrimPrefix(text+": "+j.Cause, ": ")
	}
	if j.Hint != "" {
		text += "; " + j.Hint
	}
	return text
}

// checkSaid tells what is wrong with what a command printed to stderr that ended with the status.
func checkSaid(stderr string, status int) error {
	said := 0
	for line := range strings.Lines(stderr) {
		line = strings.NewReplacer(red, "", plain, "", "\n", "").Replace(line)
		var j struct{ Error *jsonError }
		switch {
		case json.Unmarshal([]byte(line), &j) == nil:
			if j.Error == nil {
				continue // a note, or a warning
			}
			if j.Error.Cause == "" || j.Error.Exit != status {
				return fmt.Errorf("no cause, or not exit status %d: %s", status, line)
			}
			line = textOf(*j.Error)
		case !strings.HasPrefix(line, "dispatcher: "), strings.HasPrefix(line, "dispatcher: note: "), strings.HasPrefix(line, "dispatcher: warning: "):
			continue
		}
		said++
		for _, bad := range []string{": :", ": ;", "; ;", ";;", "%!", "<nil>", ":  "} {
			if strings.Contains(line, bad) {
				return fmt.Errorf("there is %q in: %s", bad, line)
			}
		}
	}
	if said == 0 {
		return fmt.Errorf("no error on stderr: %q", stderr)
	}
	return nil
}
