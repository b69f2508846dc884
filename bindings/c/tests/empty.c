/* The header alone. */
#include <unisum.h>

int main(void) { return unisum_version() == 0; }
