//! Recorded routing: Parquet files, statistics, pictures.
