#!/bin/sh
# Compiles the test objects; "go generate ./test/loading" runs it. The same sources give the same
# bytes on any machine: it needs clang 19 and nothing else, no headers of the system's.
set -eu
cd "$(dirname "$0")"
command -v clang-19 llvm-strip-19 >/dev/null || { echo 'testdata: needs clang 19: apt-get install clang-19 llvm-19' >&2; exit 1; }

# compile SOURCE OBJECT [OPTION...]: little-endian, with BTF and without DWARF.
compile() {
	source=$1 object=$2
	shift 2
	clang-19 -target bpfel -mcpu=v3 -O2 -g -std=gnu11 -Wall -Wextra -Werror -fno-ident \
		-fdebug-compilation-dir=. "$@" -c "$source" -o "$object"
	llvm-strip-19 -g "$object"
}

for source in *.c; do
	compile "$source" "${source%.c}.o"
done
compile nobtf.c nobtf.o -g0
compile shared.c shared_wide.o -DWIDE
compile shared.c shared_nobtf.o -g0
