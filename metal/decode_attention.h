// The phases of decode_attention.metal.
#pragma once
#include "attend_exact.h"
#include "attend_packed.h"
#include "queries.h"
#include "softmax.h"
