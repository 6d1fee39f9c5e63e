/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Programs that end by an exception: what bpf_assert() of the kernel's tests is made of. */
#include "test.h"

#define __ksym __attribute__((section(".ksyms")))

extern void bpf_throw(__u64 cookie) __ksym;

/* ldt_throw passes UDP datagrams to port 7000 by an exception, and others by its return. */
SEC("xdp")
int ldt_throw(struct xdp_md *ctx)
{
	if (udp_port(ctx) == 7000)
		bpf_throw(XDP_PASS);
	return XDP_PASS;
}

__attribute__((noinline)) int ldt_check(struct xdp_md *ctx)
{
	if (udp_port(ctx) == 7000)
		bpf_throw(XDP_PASS);
	return 1;
}

/* ldt_throw_below does so from another function. */
SEC("xdp")
int ldt_throw_below(struct xdp_md *ctx)
{
	return ldt_check(ctx) ? XDP_PASS : XDP_DROP;
}
