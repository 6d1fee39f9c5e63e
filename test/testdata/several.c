/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Several programs: two in one section, one in a section of its own, and some that are no members. */
#include "test.h"

SEC("xdp")
int ldt_first(struct xdp_md *ctx)
{
	return udp_port(ctx) == 7000 ? XDP_DROP : XDP_PASS;
}

SEC("xdp")
int ldt_second(struct xdp_md *ctx)
{
	return udp_port(ctx) == 7001 ? XDP_DROP : XDP_PASS;
}

SEC("xdp.frags")
int ldt_frags(struct xdp_md *ctx)
{
	return udp_port(ctx) == 7002 ? XDP_DROP : XDP_PASS;
}

SEC("xdp/devmap")
int ldt_devmap(struct xdp_md *ctx)
{
	(void)ctx;
	return XDP_PASS;
}

SEC("xdp/cpumap")
int ldt_cpumap(struct xdp_md *ctx)
{
	(void)ctx;
	return XDP_PASS;
}

SEC("tc")
int ldt_tc(void *skb)
{
	(void)skb;
	return 0;
}
