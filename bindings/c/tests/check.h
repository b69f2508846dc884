/* What the C tests check with. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unisum.h>

#define CHECK(condition)                                                                   \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            fprintf(stderr, "%s:%d: not so: %s (last: %s)\n", __FILE__, __LINE__,          \
                    #condition, unisum_last_error()->text);                                \
            exit(1);                                                                       \
        }                                                                                  \
    } while (0)

#define OK(call) EXPECT(UNISUM_OK, call)

#define EXPECT(expected, call)                                                             \
    do {                                                                                   \
        unisum_status status_ = (call);                                                    \
        if (status_ != (expected)) {                                                       \
            fprintf(stderr, "%s:%d: %s gave %s, not %s: %s\n", __FILE__, __LINE__, #call,  \
                    unisum_status_name(status_), #expected, unisum_last_error()->text);    \
            exit(1);                                                                       \
        }                                                                                  \
    } while (0)

/* A call fails, and says something of it. */
#define REFUSED(expected, words, call)                                                     \
    do {                                                                                   \
        EXPECT(expected, call);                                                            \
        CHECK(unisum_last_error()->status == (expected));                                  \
        CHECK(strstr(unisum_last_error()->text, words) != NULL);                           \
    } while (0)

#endif
