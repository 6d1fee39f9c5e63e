/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * ldt_filter drops UDP datagrams to a port. It has a constant to choose the port, a map of its own, and
 * variables in .data and .bss.
 */
#include "test.h"

volatile const __u16 port = 7000;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} ldt_dropped SEC(".maps");

__u64 seen;          /* .bss */
__u64 left = 1 << 30; /* .data */

SEC("xdp")
int ldt_filter(struct xdp_md *ctx)
{
	__u32 zero = 0;
	__u64 *dropped;

	atomic_add(&seen, 1);
	atomic_add(&left, -1);
	if (udp_port(ctx) != port)
		return XDP_PASS;
	dropped = bpf_map_lookup_elem(&ldt_dropped, &zero);
	if (dropped)
		atomic_add(dropped, 1);
	return XDP_DROP;
}
