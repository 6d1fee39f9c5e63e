/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A program that makes tail calls of its own. */
#include "../../../../programs/bpf/xdp.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define BPF_MAP_TYPE_PROG_ARRAY 3

static long (*const tail_call)(void *ctx, void *map, __u32 index) = (void *)12;

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} next SEC(".maps");

SEC("xdp")
int tailcall(struct xdp_md *ctx)
{
	tail_call(ctx, &next, 0);
	return XDP_PASS;
}
