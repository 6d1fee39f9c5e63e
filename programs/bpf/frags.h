/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Packets in several buffers, of which an XDP program sees the first.
 */
#pragma once

#include "xdp.h"

/*
 * Whether packets may be in several buffers (xdp.frags, Linux 5.18). Whoever loads the program with
 * frags sets it: that it is there says that the program can have them. The verifier does not look at
 * code behind a constant that is 0, so older kernels take the program.
 */
volatile const __u8 ld_frags = 0;

static __u64 (*const bpf_xdp_get_buff_len)(struct xdp_md *xdp) = (void *)188;

/* The length of the packet in all its buffers. */
static __always_inline __u64 packet_len(struct xdp_md *ctx)
{
	struct cursor c = packet(ctx);

	return ld_frags ? bpf_xdp_get_buff_len(ctx) : c.end - c.pos;
}
