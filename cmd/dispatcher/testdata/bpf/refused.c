/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A program that the verifier refuses: it reads a packet without checking its length. */
#include "../../../../programs/bpf/xdp.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

SEC("xdp")
int refused(struct xdp_md *ctx)
{
	const __u8 *packet = (void *)(long)ctx->data;

	return *packet & 1 ? XDP_DROP : XDP_PASS;
}
