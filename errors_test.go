package dispatcher

import (
	"context"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// broken is a handle that fails in everything.
type broken struct{ target.Handle }

func (broken) Update(context.Context, load.Source) error      { return fs.ErrClosed }
func (broken) Set(context.Context, hook.Settings) error       { return fs.ErrClosed }
func (broken) Move(context.Context, hook.Position) error      { return fs.ErrClosed }
func (broken) Pin(context.Context) (string, error)            { return "", fs.ErrClosed }
func (broken) Unpin(context.Context) error                    { return fs.ErrClosed }
func (broken) Detach(context.Context) error                   { return fs.ErrClosed }
func (broken) Close() error                                   { return fs.ErrClosed }
func (broken) Info(context.Context) (*hook.Member, error)     { return nil, fs.ErrClosed }
func (broken) Chain(context.Context) (*hook.Chain, error)     { return nil, fs.ErrClosed }
func (broken) Changes() *state.Changes                        { return nil }
func (broken) Program(context.Context) (*ebpf.Program, error) { return nil, fs.ErrClosed }

// Error is what every function returns on failure. A function that is new needs a line here.
func TestEveryErrorIsAnError(t *testing.T) {
	ctx, end := context.WithCancel(t.Context())
	end()
	nowhere := On("nohook", "lo")
	l := &Link{target: XDP("eth0"), handle: broken{}}
	errOf := func(_ any, err error) error { return err }
	provoked := map[string]error{
		"Adopt":         errOf(Adopt(ctx, nowhere, AdoptOptions{})),
		"AdoptLink":     errOf(AdoptLink(ctx, 1<<32-1, AdoptOptions{})),
		"Attach":        errOf(Attach(ctx, nowhere, Source{}, Options{})),
		"Convert":       errOf(Convert(ctx, nowhere, hook.StyleOwned, ConvertOptions{})),
		"Detach":        Detach(ctx, nowhere, "a", DetachOptions{}),
		"DetachAll":     DetachAll(ctx, nowhere, DetachOptions{}),
		"DetachLink":    DetachLink(ctx, 1<<32-1, DetachOptions{}),
		"Doctor":        errOf(Doctor(ctx, ReadOptions{})),
		"Effective":     errOf(Effective(ctx, nowhere, ReadOptions{})),
		"Explain":       errOf(Explain(ctx, nowhere, ExplainOptions{})),
		"Features":      errOf(Features(ctx, XDP("nodevice"), ReadOptions{})),
		"HoldersIn":     errOf(HoldersIn(ctx, nil, HoldersOptions{})),
		"HoldersOf":     errOf(HoldersOf(ctx, hook.HolderRef{Kind: hook.HolderLink, ID: 1<<32 - 1}, HoldersOptions{})),
		"HoldersOn":     errOf(HoldersOn(ctx, nowhere, "", HoldersOnOptions{})),
		"List":          errOf(List(ctx, ListOptions{NetNS: "nons"})),
		"MarkOf":        errOf(MarkOf(1<<32 - 1)),
		"MountBPFFS":    errOf(MountBPFFS("/proc/nowhere")),
		"Open":          errOf(Open(ctx, nowhere, "a", ReadOptions{})),
		"OpenPinned":    errOf(OpenPinned(ctx, "/proc/nowhere")),
		"PlanAdopt":     errOf(PlanAdopt(ctx, nowhere, AdoptOptions{})),
		"Plan":          errOf(Plan(ctx, nowhere, Source{}, Options{})),
		"Read":          errOf(Read(ctx, nowhere, ReadOptions{})),
		"Recover":       errOf(Recover(ctx, RecoverOptions{BPFFS: "/proc/nowhere"})),
		"Seal":          errOf(Seal(ctx, nowhere, SealOptions{})),
		"Unseal":        Unseal(ctx, nowhere, ReadOptions{}),
		"Link.Update":   l.Update(ctx, Source{}),
		"Link.Set":      l.Set(ctx, hook.Settings{}),
		"Link.Move":     l.Move(ctx, hook.Position{}),
		"Link.Pin":      errOf(l.Pin(ctx)),
		"Link.Unpin":    l.Unpin(ctx),
		"Link.Detach":   l.Detach(ctx),
		"Link.Close":    l.Close(),
		"Link.Wait":     l.Wait(ctx),
		"Link.Info":     errOf(l.Info(ctx)),
		"Link.Chain":    errOf(l.Chain(ctx)),
		"Link.Program":  errOf(l.Program(ctx)),
		"Explainer.Run": nil, // needs something to run: see the tests of explaining
	}
	for name, err := range provoked {
		if name != "Explainer.Run" {
			qt.Check(t, qt.IsNil(testenv.CheckError(err)), qt.Commentf("%s: %v", name, err))
		}
	}
	for _, name := range failing(t) {
		if _, ok := provoked[name]; !ok {
			t.Errorf("%s returns an error that this test does not provoke", name)
		}
	}
}

// failing are the exported functions and methods of this package that return an error.
func failing(t *testing.T) (names []string) {
	files, err := os.ReadDir(".")
	qt.Assert(t, qt.IsNil(err))
	for _, file := range files {
		if !strings.HasSuffix(file.Name(), ".go") || strings.HasSuffix(file.Name(), "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), file.Name(), nil, 0)
		qt.Assert(t, qt.IsNil(err))
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || !fn.Name.IsExported() || fn.Type.Results == nil {
				continue
			}
			last := fn.Type.Results.List[len(fn.Type.Results.List)-1].Type
			if id, ok := last.(*ast.Ident); !ok || id.Name != "error" {
				continue
			}
			name := fn.Name.Name
			if fn.Recv != nil {
				of := fn.Recv.List[0].Type
				if star, ok := of.(*ast.StarExpr); ok {
					of = star.X
				}
				if !of.(*ast.Ident).IsExported() {
					continue
				}
				name = of.(*ast.Ident).Name + "." + name
			}
			names = append(names, name)
		}
	}
	return names
}
