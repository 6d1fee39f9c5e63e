/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The usual file: one program, a constant to set and a map to share. */
#include "../../../../programs/bpf/xdp.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

const volatile __u32 verdict = XDP_PASS;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} hits SEC(".maps");

SEC("xdp")
int single(struct xdp_md *ctx)
{
	__u32 zero = 0;
	__u64 *n = bpf_map_lookup_elem(&hits, &zero);

	if (n)
		__sync_fetch_and_add(n, 1);
	return verdict;
}
