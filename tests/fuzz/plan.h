/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a connection of the stream fuzzer does, drawn from the seed and the connection's number
 * alone, so that both ends know it and a run can be repeated.
 */
#ifndef PLAN_H
#define PLAN_H

#include <stdint.h>

enum side { CLIENT, SERVER };

enum kind {
	PING_PONG, /* they take turns; one thread at each end, or a new one for each turn */
	DUPLEX,	   /* both speak at once; a writer and a reader thread at each end */
	ONE_WAY,   /* one speaks, then closes */
	EVENTS,	   /* both speak at once; non-blocking, edge-triggered epoll, one thread */
	FRAMES,	   /* several writer threads at each end send framed messages */
	KINDS,
};

enum reading { RECV, RECV_TWO_BUFFERS, RECV_WAITALL, RECV_LOWAT, RECV_PEEK, RECV_POLL, READINGS };
enum writing { SEND, SEND_TWO_BUFFERS, SEND_MMSG, SEND_MORE, SEND_FILE, SEND_POLL, WRITINGS };
/* How a non-blocking end waits for bytes: an event loop. SHORT is edge-triggered and takes a short
 * read for the end of what is there, as epoll(7) allows. */
enum waiting { POLL, LEVEL, EDGE, SHORT, WAITINGS };
enum speed { FAST, SLOW, BURSTY, SPEEDS };

/* How one end behaves. */
struct manner {
	enum reading reading;
	enum writing writing;
	enum speed reads;
	int is_nonblocking;
	int toggles; /* a blocking end that is non-blocking between its turns, PING_PONG */
	enum waiting waiting;
	uint32_t largest_read;	/* bytes */
	uint32_t largest_write; /* bytes */
	uint32_t pause_chance;	/* before a write, in 1024 */
};

#define FRAME_LIMIT 4096 /* bytes, FRAMES */

struct plan {
	uint32_t number;
	enum kind kind;
	uint32_t greetings; /* small exchanges before anything else, in which it may join */
	int deferred;	    /* through the listener with TCP_DEFER_ACCEPT */
	int64_t bytes[2];   /* said by the client, by the server; not PING_PONG and FRAMES */
	uint32_t turns;	    /* PING_PONG */
	uint32_t turn_size; /* the largest, PING_PONG */
	int thread_per_turn;
	enum side first;
	uint32_t writers; /* FRAMES: threads at each end */
	uint32_t frames;  /* FRAMES: of each writer */
	int locked;	  /* FRAMES: one writer at a time */
	int aborts;	  /* one end leaves in the middle */
	enum side abort_by;
	int64_t abort_at; /* bytes said and heard by then */
	int abort_hard;	  /* by RST, not by close */
	struct manner manner[2];
};

struct dice {
	uint64_t state;
};

static inline uint64_t mix(uint64_t x) /* splitmix64 */
{
	x += 0x9e3779b97f4a7c15;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
	x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
	return x ^ (x >> 31);
}

static inline struct dice dice_of(uint64_t seed, uint32_t number, uint32_t purpose)
{
	return (struct dice){mix(mix(seed) ^ ((uint64_t)number << 8 | purpose))};
}

static inline uint64_t below(struct dice *dice, uint64_t limit)
{
	dice->state += 0x9e3779b97f4a7c15;
	return mix(dice->state) % limit;
}

static inline int chance(struct dice *dice, uint32_t in_1024)
{
	return below(dice, 1024) < in_1024;
}

/* From 1 to limit, each order of magnitude as likely as the next. */
static inline uint64_t any_size(struct dice *dice, uint64_t limit)
{
	uint64_t top = 1ULL << below(dice, 64 - __builtin_clzll(limit));
	uint64_t size = top + below(dice, top);

	return size < limit ? size : limit;
}

static inline struct manner draw_manner(struct dice *dice)
{
	struct manner manner;

	manner.reading = below(dice, READINGS);
	manner.writing = below(dice, WRITINGS);
	manner.reads = chance(dice, 600) ? FAST : below(dice, SPEEDS);
	manner.largest_read = 1 + any_size(dice, 1 << 18);
	manner.largest_write = 1 + any_size(dice, 1 << 20);
	manner.pause_chance = chance(dice, 300) ? below(dice, 200) : 0;
	return manner;
}

/* Only connections whose ends both are non-blocking join. */
static inline void draw_blocking(struct dice *dice, struct plan *plan)
{
	static const int ends[] = {3, 3, 3, 3, 3, 3, 1, 2, 0, 0};
	int nonblocking = plan->kind == EVENTS ? 3 : ends[below(dice, 10)];

	for (int side = 0; side < 2; side++) {
		struct manner *manner = &plan->manner[side];

		manner->is_nonblocking = nonblocking >> side & 1;
		manner->toggles =
			!manner->is_nonblocking && plan->kind == PING_PONG && chance(dice, 300);
		manner->waiting = below(dice, WAITINGS);
		/* It sets an option with which nothing joins, and no edge comes below the mark. */
		if (manner->is_nonblocking && manner->reading == RECV_LOWAT && chance(dice, 800))
			manner->reading = RECV;
		if (manner->reading == RECV_LOWAT)
			manner->waiting = POLL;
		/* Nothing joins with it either. */
		if (manner->is_nonblocking && manner->writing == SEND_MMSG && chance(dice, 800))
			manner->writing = SEND;
	}
}

static inline int64_t at_most(int64_t value, int64_t limit)
{
	return value < limit ? value : limit;
}

/* Tiny writes and reads make short streams: a connection should be over in a second or so. */
static inline void shorten(struct plan *plan)
{
	for (int side = 0; side < 2; side++) {
		int64_t write = plan->manner[side].largest_write;
		int64_t read = plan->manner[!side].largest_read;

		plan->bytes[side] = at_most(at_most(plan->bytes[side], 2000 * write), 5000 * read);
		plan->turn_size = at_most(at_most(plan->turn_size, 100 * write), 200 * read);
	}
	if (plan->turn_size > 1 << 15)
		plan->turns = plan->turns % 16 + 1;
}

static inline struct plan draw_plan(uint64_t seed, uint32_t number)
{
	struct dice dice = dice_of(seed, number, 0);
	uint32_t kind = below(&dice, 100);
	struct plan plan = {.number = number};

	plan.kind = kind < 45	? PING_PONG
		    : kind < 62 ? DUPLEX
		    : kind < 75 ? ONE_WAY
		    : kind < 90 ? EVENTS
				: FRAMES;
	plan.deferred = chance(&dice, 150);
	plan.first = below(&dice, 2);
	plan.bytes[CLIENT] = any_size(&dice, 4 << 20);
	plan.bytes[SERVER] = any_size(&dice, 4 << 20);
	if (plan.kind == ONE_WAY)
		plan.bytes[!plan.first] = 0;
	plan.turns = any_size(&dice, 100);
	plan.turn_size = any_size(&dice, 1 << 20);
	plan.thread_per_turn = chance(&dice, 200);
	plan.writers = 2 + below(&dice, 3);
	plan.frames = any_size(&dice, 60);
	plan.locked = chance(&dice, 512);
	if (!plan.locked) /* all of it fits into a send buffer: TCP has no reason to tear a frame */
		plan.frames = at_most(plan.frames, 160000 / (FRAME_LIMIT * plan.writers));
	plan.aborts = plan.kind != DUPLEX && plan.kind != FRAMES && chance(&dice, 150);
	plan.abort_by = below(&dice, 2);
	plan.abort_at = any_size(&dice, 1 << 21);
	plan.abort_hard = chance(&dice, 512);
	plan.manner[CLIENT] = draw_manner(&dice);
	plan.manner[SERVER] = draw_manner(&dice);
	draw_blocking(&dice, &plan);
	plan.greetings = chance(&dice, 850) ? any_size(&dice, 64) : 0;
	shorten(&plan);
	return plan;
}

/* How much is said in a turn of PING_PONG; both ends draw the same, one turn after the other. */
static inline uint64_t turn_size(struct dice *turns, const struct plan *plan)
{
	return any_size(turns, plan->turn_size);
}

#endif
