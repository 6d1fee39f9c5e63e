/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* ldt_refused reads the packet without a look at its end; the verifier refuses that. */
#include "test.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
	PIN_BY_NAME;
} ldt_refused_map SEC(".maps");

SEC("xdp")
int ldt_refused(struct xdp_md *ctx)
{
	const __u8 *data = (const void *)(long)ctx->data;
	__u32 zero = 0;

	if (!bpf_map_lookup_elem(&ldt_refused_map, &zero))
		return XDP_DROP;
	return data[0] ? XDP_DROP : XDP_PASS;
}
