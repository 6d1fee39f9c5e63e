// Package object embeds the compiled programs of the folder programs/bpf.
//
// Everything else in this folder is generated. "go generate" gives the same bytes
// on any machine: it needs clang 19, and no headers of the system.
package object

//go:generate sh -c "{ command -v clang-19 && command -v llvm-strip-19; } >/dev/null || { echo 'programs: needs clang 19: apt-get install clang-19 llvm-19' >&2; exit 1; }"

//go:generate -command bpf go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel,bpfeb -no-global-types -cflags "-mcpu=v3 -std=gnu11 -Wall -Wextra -Werror"
//go:generate bpf Droplist ../../bpf/droplist.c
//go:generate bpf Ratelimit ../../bpf/ratelimit.c
//go:generate bpf Count ../../bpf/count.c
//go:generate bpf Sample ../../bpf/sample.c
//go:generate bpf Redirect ../../bpf/redirect.c
