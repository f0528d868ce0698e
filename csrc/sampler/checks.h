// What could make the sampler read or write outside its arrays is refused here, with words for people.
#pragma once

#include <cstdint>

#include "sampler/negatives.h"
#include "sampler/philox.h"
#include "sampler/windows.h"

namespace metarec {

// All throw std::invalid_argument.
Randomness checked_randomness(uint64_t seed, uint64_t stream, int64_t step, Purpose purpose);
void check_first_row(int64_t first_row, int64_t rows);

// Every row must be a user whose events lie inside items.
void check_users(const int64_t* users, int64_t rows, const Sequences& data, int64_t num_users, int64_t events);

// Draws, once users are among num_users, segments rise to positions and every row that draws has an unseen item.
// names[b]: what the caller calls row b. popularity without cells: uniform.
void draw_negatives(const NegativeRows& in, const Popularity& popularity, const int64_t* names, int64_t num_users,
                    int64_t positions);

}  // namespace metarec
