/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Two programs to choose from, and one for another hook. */
#include "../../../../programs/bpf/xdp.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

SEC("xdp")
int first(struct xdp_md *ctx)
{
	return XDP_PASS;
}

SEC("xdp/again")
int second(struct xdp_md *ctx)
{
	return XDP_PASS;
}

SEC("tc")
int classify(void *skb)
{
	return 0;
}
