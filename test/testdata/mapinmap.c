/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* ldt_outer_inner finds the port to drop in a map that it reaches only through another one. */
#include "test.h"

struct inner {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} ldt_inner SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct inner);
} ldt_outer SEC(".maps") = {
	.values = { [0] = &ldt_inner },
};

SEC("xdp")
int ldt_nested(struct xdp_md *ctx)
{
	__u32 zero = 0;
	__u32 *port;
	void *inner = bpf_map_lookup_elem(&ldt_outer, &zero);

	if (!inner)
		return XDP_PASS;
	port = bpf_map_lookup_elem(inner, &zero);
	if (!port || udp_port(ctx) != *port)
		return XDP_PASS;
	return XDP_DROP;
}
