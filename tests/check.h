/* The frame of the tests in C: tests with names, and checks that tell the line and what was there instead.
 *
 *   PROGRAM [CERTS_DIR [NAME-FILTER...]]     a test runs if its name contains one of the filters
 *   PROGRAM -l [NAME-FILTER...]              lists the names
 *
 * A check with a text prints a line, `ok - PROGRAM NAME: TEXT` or `not ok - PROGRAM NAME: line N: TEXT: VALUES`; one
 * without prints only what fails. A test that printed nothing was good: `ok - PROGRAM NAME`. */
#ifndef CHECK_H
#define CHECK_H

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct test {
    const char *name;
    void (*run)(void);
};

static const char *certs = "certs"; /* the folder with ca.pem, server.pem, client.pem and their keys */
static const char *test_program, *test_name;
static char **test_filters;
static bool test_listing;
static int tests_chosen, test_lines, checks, checks_failed;
static void (*check_values)(void); /* prints what else is known where a check fails */

/* wrong: NULL is good; otherwise what to print behind the text, if anything. */
static inline void check_print(int line, const char *wrong, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static inline void check_print(int line, const char *wrong, const char *format, ...)
{
    va_list args;
    checks++;
    checks_failed += wrong != NULL;
    test_lines++;
    printf("%s - %s %s: ", wrong ? "not ok" : "ok", test_program, test_name);
    if (wrong)
        printf("line %d: ", line);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    if (wrong && wrong[0])
        printf(": %s", wrong);
    if (wrong && check_values)
        check_values();
    putchar('\n');
}

static inline const char *check_numbers(const char *what, long long got, long long expected)
{
    static char wrong[200];
    snprintf(wrong, sizeof wrong, "%s is %lld, not %lld", what, got, expected);
    return got == expected ? NULL : wrong;
}

static inline const char *check_texts(const char *what, const char *got, const char *expected)
{
    static char wrong[600];
    snprintf(wrong, sizeof wrong, "%s is \"%s\", not \"%s\"", what, got, expected);
    return strcmp(got, expected) == 0 ? NULL : wrong;
}

#define CHECK(condition) ((condition) ? (void)checks++ : check_print(__LINE__, "", "%s", #condition))
#define CHECK_THAT(condition, ...) check_print(__LINE__, (condition) ? NULL : #condition, __VA_ARGS__)
#define CHECK_EQ(got, expected, ...)                                                                                   \
    check_print(__LINE__, check_numbers(#got, (long long)(got), (long long)(expected)), __VA_ARGS__)
#define CHECK_TEXT(got, expected, ...) check_print(__LINE__, check_texts(#got, got, expected), __VA_ARGS__)

/* What nothing goes on without. */
#define REQUIRE(condition, ...)                                                                                        \
    ((condition) ? (void)0 : (check_print(__LINE__, #condition, __VA_ARGS__), exit(EXIT_FAILURE)))

static inline void test_skip(const char *what, const char *reason)
{
    test_lines++;
    printf("skip - %s %s: %s: %s\n", test_program, test_name, what, reason);
}

static inline void tests_begin(const char *program, int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    test_program = program;
    test_listing = argc > 1 && strcmp(argv[1], "-l") == 0;
    certs = argc > 1 ? argv[1] : certs;
    test_filters = argc > 1 ? argv + 2 : argv + argc;
}

static inline void test_end(void)
{
    if (test_name && test_lines == 0)
        printf("ok - %s %s\n", test_program, test_name);
    test_name = NULL;
}

/* Whether the test of this name is to be run now. */
static inline bool test_begin(const char *name)
{
    bool chosen = !*test_filters;
    test_end();
    for (char **filter = test_filters; *filter; filter++)
        chosen = chosen || strstr(name, *filter);
    tests_chosen += chosen;
    if (chosen && test_listing)
        puts(name);
    if (!chosen || test_listing)
        return false;
    test_name = name;
    test_lines = 0;
    return true;
}

/* Returns the program's exit status. */
static inline int tests_end(void)
{
    test_end();
    if (tests_chosen == 0)
        fprintf(stderr, "%s: no test has such a name; -l lists them\n", test_program);
    return tests_chosen == 0 ? 2 : checks_failed > 0;
}

static inline int run_tests(const char *program, const struct test *tests, size_t count, int argc, char **argv)
{
    tests_begin(program, argc, argv);
    for (size_t i = 0; i < count; i++)
        if (test_begin(tests[i].name))
            tests[i].run();
    return tests_end();
}

#define RUN_TESTS(program, tests, argc, argv) run_tests(program, tests, sizeof(tests) / sizeof *(tests), argc, argv)

#endif
