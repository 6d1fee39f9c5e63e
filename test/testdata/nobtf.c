/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* ldt_nobtf is compiled without -g: its global has no type. */
#include "test.h"

volatile const __u32 verdict = XDP_PASS;

SEC("xdp")
int ldt_nobtf(struct xdp_md *ctx)
{
	(void)ctx;
	return verdict;
}
