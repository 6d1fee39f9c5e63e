package main

import (
	"context"
	"errors"
	"slices"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/apply"
	"github.com/libdispatcher/dispatcher/internal/document"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/plan"
)

// errDiffers: diff found a difference.
var errDiffers = errors.New("not as declared")

const documentHelp = `A document is a YAML file:

  attachments:
  - name: droplist
    hook: xdp
    on: {names: ["eth*"], kind: [physical]}
    program: {builtin: droplist}
    order: {priority: 20}

Each FILE|DIR is a document or a folder of documents that end in .yaml. Without
one they are in /etc/dispatcher/attachments.d, /run/dispatcher/attachments.d and
/usr/lib/dispatcher/attachments.d: of two of the same name that of the first
folder counts, and a link to /dev/null masks one. The members get the owner label
apply/FOLDER, or apply/FILE for a document outside of a folder, and members of
other owners are left alone.`

func (a *app) applyCommand() *cobra.Command {
	var (
		flags  applyFlags
		dryRun bool
		wait   bool
	)
	cmd := &cobra.Command{
		Use:   "apply [FILE|DIR...]",
		Short: "Attach what documents declare, and change what differs",
		Long: `Attach what documents declare, and change what differs: programs are replaced
atomically, with their maps; members are set, and move. What is as declared is not
touched. What cannot be done is said, and the rest is done; a program that does
not load leaves the old one running.

` + documentHelp + `

In the list
  +  it is attached
  ~  it is changed
  -  it is detached, with --prune: no document declares it any more
  ?  no document declares it any more, and it stays
  !  it cannot be as declared; the error below says why
  =  it is as declared (with -v)`,
		Example: `  dispatcher apply
  dispatcher apply edge.yaml --dry-run
  dispatcher apply /etc/dispatcher/attachments.d --prune
  dispatcher apply edge.yaml --wait`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if dryRun && wait {
				return usage("leave one of them out", "--dry-run shows what is to be done now, and --wait waits")
			}
			return a.apply(cmd.Context(), args, &flags, dryRun, wait)
		},
	}
	flags.add(cmd)
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only show what would be done")
	cmd.Flags().BoolVar(&wait, "wait", false, "wait for devices, cgroups and network namespaces that are not there yet")
	return cmd
}

func (a *app) diffCommand() *cobra.Command {
	var flags applyFlags
	cmd := &cobra.Command{
		Use:   "diff [FILE|DIR...]",
		Short: "Show what is not as documents declare",
		Long: `Show what is not as documents declare. The status is 0 if nothing differs, and 6
if something does. "apply --dry-run" shows the same, and its status is that of
"apply".

` + documentHelp,
		Example: `  dispatcher diff
  dispatcher diff edge.yaml -j`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			docs, o, err := a.documents(args, &flags)
			if err != nil && len(docs) == 0 {
				return err
			}
			report, diffErr := apply.Diff(cmd.Context(), docs, o)
			if diffErr != nil {
				return join(err, diffErr)
			}
			if err := join(a.printReport(report, true), err, failures(report)); err != nil {
				return err
			}
			if differs(report) {
				return hook.Because(errDiffers, "not all is as declared").
					Hint("\"%s\" makes it so", kernel.Command(a.netns, a.bpffs, nil, append([]string{"apply"}, args...)...))
			}
			return nil
		},
	}
	flags.add(cmd)
	return cmd
}

// applyFlags are those of apply and diff.
type applyFlags struct {
	prune  bool
	device string
}

func (f *applyFlags) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.prune, "prune", false, "detach members that were made for these documents and are not declared any more")
	cmd.Flags().StringVar(&f.device, "device", "", "look at this `DEV` only, in the network namespace of -n: for when one has come")
}

// documents reads what is declared. Documents that are wrong are in the error.
func (a *app) documents(paths []string, f *applyFlags) ([]apply.Document, apply.Options, error) {
	if len(paths) == 0 {
		paths = document.Folders
	}
	set := document.Read(paths)
	for _, path := range set.Ignored {
		a.warn("%s is ignored: documents end in .yaml", path)
	}
	if f.prune && len(set.Errs) > 0 {
		a.warn("--prune detaches nothing, since a document could not be considered: what it declares is not known")
	}
	var docs []apply.Document
	for _, s := range set.Sources {
		docs = append(docs, apply.Document{Document: s.Document, File: s.File, Owner: s.Owner})
	}
	return docs, apply.Options{
		Options: plan.Options{Owners: set.Owners, Partial: len(set.Errs) > 0, Prune: f.prune}, NetNS: a.netns, BPFFS: a.bpffs, Device: f.device,
	}, join(set.Errs...)
}

// apply applies documents, or shows what that would do.
func (a *app) apply(ctx context.Context, paths []string, f *applyFlags, dryRun, wait bool) error {
	docs, o, err := a.documents(paths, f)
	if err != nil && len(docs) == 0 {
		return err
	}
	if dryRun {
		report, diffErr := apply.Diff(ctx, docs, o)
		if diffErr != nil {
			return join(err, diffErr)
		}
		return join(a.printReport(report, true), err, failures(report))
	}
	if err := a.needBPFFS(len(docs) > 0); err != nil {
		return err
	}
	if !wait {
		report, applyErr := apply.Apply(ctx, docs, o)
		if applyErr != nil {
			return join(err, applyErr)
		}
		return join(a.printReport(report, false), err, failures(report))
	}
	waiter, waitErr := apply.NewWaiter(docs, a.netns)
	if waitErr != nil {
		return join(err, waitErr)
	}
	defer waiter.Close()
	for first := true; ; first = false {
		report, applyErr := apply.Apply(ctx, docs, o)
		if applyErr != nil {
			return join(err, applyErr)
		}
		if first || differs(report) || !report.Missing() {
			if printErr := a.printReport(report, false); printErr != nil {
				return printErr
			}
		}
		if !report.Missing() {
			return join(err, failures(report))
		}
		if waitErr := waiter.Wait(ctx, report); waitErr != nil {
			return join(err, waitErr)
		}
	}
}

// differs tells whether something was or is to be done.
func differs(r *apply.Report) bool {
	return len(r.Sealed) > 0 || slices.ContainsFunc(r.Results, func(r apply.Result) bool { return r.Acts() || r.State == plan.Undeclared })
}

// failures are the errors of a report: those about devices that are not there come last, since another
// one is worse.
func failures(r *apply.Report) error {
	var worse, missing []error
	for i := range r.Results {
		switch r := &r.Results[i]; r.State {
		case plan.NoDevice:
			missing = append(missing, r.Err)
		default:
			worse = append(worse, r.Err)
		}
	}
	return join(append(worse, missing...)...)
}
