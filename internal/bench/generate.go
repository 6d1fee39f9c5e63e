package main

//go:generate sh -c "{ command -v clang-19 && command -v llvm-strip-19; } >/dev/null || { echo 'bench: needs clang 19: apt-get install clang-19 llvm-19' >&2; exit 1; }"

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel,bpfeb -no-global-types -cflags "-mcpu=v3 -std=gnu11 -Wall -Wextra -Werror" members bpf/members.c
