/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * ldt_entry goes on to ldt_tail, which drops UDP datagrams to port 7000, through a prog array of its own.
 * ldt_broken is in the same file and would be refused; it must not matter.
 */
#include "test.h"

int ldt_tail(struct xdp_md *ctx);

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, int(struct xdp_md *));
} ldt_jumps SEC(".maps") = {
	.values = { [0] = ldt_tail },
};

SEC("xdp")
int ldt_entry(struct xdp_md *ctx)
{
	bpf_tail_call(ctx, &ldt_jumps, 0);
	return XDP_PASS;
}

SEC("xdp")
int ldt_tail(struct xdp_md *ctx)
{
	return udp_port(ctx) == 7000 ? XDP_DROP : XDP_PASS;
}

SEC("xdp")
int ldt_broken(struct xdp_md *ctx)
{
	return *(const __u8 *)(long)ctx->data;
}
