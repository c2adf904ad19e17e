/* What codec and session keep for any bytes at all. A property that does not hold is told and aborts, as a sanitizer's
 * finding does. The bytes looked at always end where an unmapped page begins, so reading one more is a crash. */
#ifndef ORACLE_H
#define ORACLE_H

#include <stddef.h>
#include <stdint.h>

enum { ORACLE_MAX = 1 << 17 }; /* bytes of an input */

/* Frames point into the input and lie one behind the other; one at a time or many at once gives the same; a cut frame
 * needs more, and says so. */
void oracle_codec(const uint8_t *bytes, size_t size);
/* Both sides: events, output and the end are the same whole and in fragments. how: the fragments' bytes in its lower
 * six bits; the others have the provider drain from the start, and refuse the classic dialect. */
void oracle_session(const uint8_t *bytes, size_t size, unsigned how);
/* A client's session and a provider's, which only speak to each other: each byte is something that one of them does.
 * Whatever they do, neither finds the other at fault, each answer reaches its call, and in the end nothing is open. */
void oracle_pair(const uint8_t *bytes, size_t size);

#endif
