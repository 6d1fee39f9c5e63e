/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * ldt_other passes everything and counts it. It shares one map name with filter.c and has another.
 */
#include "test.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} ldt_dropped SEC(".maps"), ldt_passed SEC(".maps");

SEC("xdp")
int ldt_other(struct xdp_md *ctx)
{
	__u32 zero = 0;
	__u64 *dropped = bpf_map_lookup_elem(&ldt_dropped, &zero);
	__u64 *passed = bpf_map_lookup_elem(&ldt_passed, &zero);

	(void)ctx;
	if (dropped && passed)
		atomic_add(passed, 1);
	return XDP_PASS;
}
