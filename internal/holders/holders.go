package holders

import (
	"sync"

	"github.com/libdispatcher/dispatcher/hook"
)

func refTo(kind hook.HolderKind, id uint32) hook.HolderRef { return hook.HolderRef{Kind: kind, ID: id} }

// Options change what a Finder looks at. The zero value is right for a command.
type Options struct {
	// NoIterators restricts the Finder to /proc. Then it does not find out either
	// which programs trace or extend others.
	NoIterators bool
	// Self includes what the calling process has open, except what the Finder has
	// open.
	Self bool
}

// A Finder looks for holders. Several goroutines may use it.
type Finder struct {
	opts Options
	mu   sync.Mutex
	its  *iterators // nil with Options.NoIterators
	own  map[hook.HolderRef]bool
}

// Open loads the iterators, which takes about 25 ms. The Finder works without those
// that fail to load. The caller closes it.
func Open(o Options) *Finder {
	f := &Finder{opts: o}
	if !o.NoIterators {
		f.its = loadAll()
		f.own = f.its.own()
	}
	return f
}

// Close releases the iterators.
func (f *Finder) Close() {
	if f.its != nil {
		f.its.close()
	}
}
