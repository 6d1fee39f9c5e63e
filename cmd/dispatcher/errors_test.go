package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/load"
)

func TestExitStatus(t *testing.T) {
	at := func(err error) error {
		return &dispatcher.Error{Op: "attach", Hook: hook.XDP, Target: "eth0", Err: err}
	}
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
				`"occupant":{"kind":"foreign","link_id":12,"mode":"native","program":{"id":41,"name":"cil_xdp_entry","tag":"2cdaa4a309ea9ba2","loaded_by_uid":0}},"exit":3}}` + "\n",
		},
		{
			"several lines", app{}, errors.New("one\ntwo\n"), 2, "dispatcher: one two\n",
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
			`{"version":1,"error":{"cause":"--map m=id:x: not an id; as in id:41","exit":1}}` + "\n",
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
