/* canary [end | overflow | race]: nothing wrong, or what a sanitizer must find. */
#include <limits.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

static int shared;

static void *write_it(void *unused)
{
    shared++;
    return unused;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    char *bytes = calloc(1, 8);
    pthread_t thread;
    int kept = INT_MAX - 1;

    if (!bytes || pthread_create(&thread, NULL, write_it, NULL))
        return 2;
    if (strcmp(what, "race") == 0)
        shared++;
    pthread_join(thread, NULL);
    if (strcmp(what, "end") == 0)
        kept = ((volatile char *)bytes)[8];
    if (strcmp(what, "overflow") == 0)
        kept = kept + argc;
    free(bytes);
    return kept == 42;
}
