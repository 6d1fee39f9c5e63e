/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Pairs of programs of which the second sees what the first did to the packet: it drops what it cannot
 * recognise.
 */
#include "test.h"

#define MAGIC 0x6c647467

SEC("xdp")
int ldt_grow(struct xdp_md *ctx)
{
	struct cursor c;
	__u32 *magic;

	if (bpf_xdp_adjust_head(ctx, -(int)sizeof(*magic)))
		return XDP_ABORTED;
	c = packet(ctx);
	magic = (__u32 *)c.pos;
	if (!take(&c, sizeof(*magic)))
		return XDP_ABORTED;
	*magic = MAGIC;
	return XDP_PASS;
}

SEC("xdp")
int ldt_shrink(struct xdp_md *ctx)
{
	struct cursor c = packet(ctx);
	const __u32 *magic = c.pos;

	if (!take(&c, sizeof(*magic)) || *magic != MAGIC)
		return XDP_DROP;
	return bpf_xdp_adjust_head(ctx, sizeof(*magic)) ? XDP_ABORTED : XDP_PASS;
}

SEC("xdp")
int ldt_mark(struct xdp_md *ctx)
{
	__u32 *meta;

	if (bpf_xdp_adjust_meta(ctx, -(int)sizeof(*meta)))
		return XDP_ABORTED;
	meta = (void *)(long)ctx->data_meta;
	if ((void *)(meta + 1) > (void *)(long)ctx->data)
		return XDP_ABORTED;
	*meta = MAGIC;
	return XDP_PASS;
}

SEC("xdp")
int ldt_marked(struct xdp_md *ctx)
{
	const __u32 *meta = (const void *)(long)ctx->data_meta;

	if ((const void *)(meta + 1) > (const void *)(long)ctx->data)
		return XDP_DROP;
	return *meta == MAGIC ? XDP_PASS : XDP_DROP;
}
