/* A disk that gives way: put before the C library (LD_PRELOAD), it lets one call fail on every file whose path holds
   FAIL_NAME. FAIL_CALL is write, fsync, close or rename; FAIL_ERRNO is the error's number. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int fails(const char *call, const char *path) {
    const char *wanted = getenv("FAIL_CALL"), *name = getenv("FAIL_NAME");
    return wanted && name && !strcmp(wanted, call) && strstr(path, name) != NULL;
}

static int handle_fails(const char *call, int handle) {
    char link[64], path[4096];
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length < 0) return 0;
    path[length] = 0;
    return fails(call, path);
}

static int refuse(void) {
    errno = atoi(getenv("FAIL_ERRNO"));
    return -1;
}

#define REAL(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))

ssize_t write(int handle, const void *data, size_t count) {
    if (handle_fails("write", handle)) return refuse();
    return REAL(ssize_t, "write", int, const void *, size_t)(handle, data, count);
}

int fsync(int handle) {
    if (handle_fails("fsync", handle)) return refuse();
    return REAL(int, "fsync", int)(handle);
}

int close(int handle) { /* as on a file server: the file is closed all the same */
    int fail = handle_fails("close", handle);
    int code = REAL(int, "close", int)(handle);
    return fail ? refuse() : code;
}

int rename(const char *from, const char *to) {
    if (fails("rename", from)) return refuse();
    return REAL(int, "rename", const char *, const char *)(from, to);
}
